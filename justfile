# The developer's menu: `just` lists it.

[private]
default:
    @just --list --unsorted

# The executable, for this host
build:
    cargo build --locked

# All tests but the ones that need a real stemcell
test: build
    cargo nextest run --locked
    tests/release/run target/debug/bosh-qemu-cpi

# Formatting, clippy, licences and advisories
lint:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings
    cargo deny check

# The API documentation
docs:
    RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items

# The BOSH release with the static executable, as a tarball
release tarball="release/bosh-qemu-cpi.tgz":
    release/build
    bosh create-release --force --dir release --tarball "{{ absolute_path(tarball) }}"

# Benchmarks
bench *args:
    cargo bench --locked {{ args }}
