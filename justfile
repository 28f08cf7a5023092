# Commands for developers. `just` lists them.

[private]
default:
    @just --list --unsorted

# Build the executable for this host
build:
    cargo build --locked

# Run all tests except those that need a real stemcell
test: build
    cargo nextest run --locked
    tests/release/run target/debug/bosh-qemu-cpi

# Check formatting, clippy, licences and advisories
lint:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings
    cargo deny check

# Build the API documentation
docs:
    RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items

# Build the BOSH release with the static executable, as a tarball
release tarball="release/bosh-qemu-cpi.tgz":
    release/build
    bosh create-release --force --dir release --tarball "{{ absolute_path(tarball) }}"

# Run the benchmarks
bench *args:
    cargo bench --locked {{ args }}
