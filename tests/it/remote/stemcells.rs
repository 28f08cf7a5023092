//! A stemcell's image on its way to the host.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, StemcellCid};
use bosh_qemu_cpi::digest::Digest;
use serde_json::json;

use super::Pair;
use crate::support::host::{GUEST, eventually, text};

/// A bootable disk of `mib` MiB that does not compress, at the office.
fn disk(pair: &Pair, name: &str, mib: usize) -> PathBuf {
    let mut bytes = vec![0; mib << 20];
    let mut state = 1u32;
    for byte in &mut bytes[1 << 19..] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    bytes[..GUEST.len()].copy_from_slice(GUEST);
    let path = pair.office.path(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn create(pair: &Pair, image: &Path) -> StemcellCid {
    StemcellCid::parse(&text(&pair.office.ok("create_stemcell", &json!([image, {}])))).unwrap()
}

fn imported(pair: &Pair, stemcell: &StemcellCid) -> PathBuf {
    pair.host.store().stemcell_dir(stemcell).join("image.raw")
}

fn remove(pair: &Pair, stemcells: &[StemcellCid]) {
    for stemcell in stemcells {
        pair.office.ok("delete_stemcell", &json!([stemcell]));
    }
}

#[test]
fn it_arrives_as_it_is_and_what_the_host_has_is_not_sent_again() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 8);
    let first = create(&pair, &image);
    assert_eq!(fs::read(imported(&pair, &first)).unwrap(), fs::read(&image).unwrap());
    let again = pair.office.call("create_stemcell", &json!([image, {}]));
    assert!(again.stderr.contains("the image is here already"), "{again:?}");
    let second = StemcellCid::parse(&text(again.result())).unwrap();
    // As large, and another: the host asks for its digest, and then for all of it.
    let other = disk(&pair, "other", 8);
    let mut bytes = fs::read(&other).unwrap();
    bytes[1 << 20] ^= 1;
    fs::write(&other, &bytes).unwrap();
    let third = create(&pair, &other);
    assert_eq!(fs::read(imported(&pair, &third)).unwrap(), bytes);
    remove(&pair, &[first, second, third]);
}

#[test]
fn gzip_and_what_can_not_be_decoded_in_one_pass_arrive_too() {
    let Some(pair) = Pair::new() else { return };
    let raw = disk(&pair, "raw", 4);
    let wanted = fs::read(&raw).unwrap();
    let zipped = pair.office.path("zipped.gz");
    let output = Command::new("gzip").arg("-c").arg(&raw).output().unwrap();
    fs::write(&zipped, output.stdout).unwrap();
    // Of this one the host wants the bytes twice.
    let zstd = pair.office.path("zstd");
    let mut convert = Command::new("qemu-img");
    convert
        .args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"])
        .args([&raw, &zstd]);
    assert!(convert.status().unwrap().success());
    let stemcells = [&zipped, &zstd].map(|image| create(&pair, image));
    for stemcell in &stemcells {
        assert_eq!(fs::read(imported(&pair, stemcell)).unwrap(), wanted);
    }
    remove(&pair, &stemcells);
}

#[test]
fn one_that_the_host_refuses_is_refused_while_it_is_sent() {
    let Some(pair) = Pair::new() else { return };
    let image = pair.office.path("noise");
    fs::write(&image, vec![7; 32 << 20]).unwrap();
    for (image, words) in [
        (image, "it is neither qcow2 nor a disk with a boot signature"),
        (pair.office.path("empty"), "it is empty"),
        (pair.office.path("nothing"), "No such file"),
        (pair.office.path(""), "is no file"),
    ] {
        if image.ends_with("empty") {
            fs::write(&image, "").unwrap();
        }
        let refused = pair.office.call("create_stemcell", &json!([image, {}]));
        assert!(refused.failure().message.contains(words), "{refused:?}");
    }
    assert_eq!(pair.host.store().list::<bosh_qemu_cpi::store::StemcellRecord>().unwrap(), []);
}

#[test]
fn one_that_breaks_off_leaves_nothing_and_the_next_starts_clean() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 64);
    let mut call = pair.office.start("create_stemcell", &json!([image, {}]));
    let stemcells = pair.host.path("state/stemcells");
    eventually("an import that has begun", || {
        let partial =
            fs::read_dir(&stemcells).ok()?.flatten().flat_map(|dir| fs::read_dir(dir.path()).ok());
        partial
            .flatten()
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with(".import"))
            .then_some(())
    });
    call.kill().unwrap();
    call.wait().unwrap();
    eventually("nothing of it is left", || {
        fs::read_dir(&stemcells).unwrap().next().is_none().then_some(())
    });
    let stemcell = create(&pair, &image);
    assert_eq!(fs::read(imported(&pair, &stemcell)).unwrap(), fs::read(&image).unwrap());
    remove(&pair, &[stemcell]);
}

/// A caller that sends something else than it says.
#[test]
fn one_that_is_damaged_on_its_way_is_refused() {
    let Some(pair) = Pair::new() else { return };
    let image = fs::read(disk(&pair, "image", 1)).unwrap();
    let request = crate::support::host::request("create_stemcell", &json!(["/image", {}]));
    let question = json!({"call": {"request": request, "image": image.len()}});
    let mut wrong = image.clone();
    wrong[5000] ^= 1;
    let digest = json!(Digest::of(&image).to_string());
    let mut input = format!("{question}\n").into_bytes();
    input.extend(wrong);
    input.extend(format!("{digest}\n").into_bytes());
    let mut command = pair.host.cpi();
    command.args(["host", "serve"]);
    let output = pair.host.namespace().run(|| crate::support::answer::run(command, &input));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("did not arrive as it was sent"), "{said}");
    assert_eq!(pair.host.store().list::<bosh_qemu_cpi::store::StemcellRecord>().unwrap(), []);
}

/// A host that never wants the image, and one that wants something unheard of.
#[test]
fn a_host_that_makes_no_sense_is_told_of() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 1);
    let socket = pair.office.path("fake.sock");
    pair.office.configure(&json!({"transport": {"kind": "unix", "socket": socket}}));
    for (says, expected) in [
        (
            vec!["{\"greeting\":{\"program\":\"telnetd\",\"version\":\"1\"}}"],
            "what answers there is not bosh-qemu-cpi",
        ),
        (vec!["Welcome to Ubuntu"], "what answers there is not bosh-qemu-cpi"),
        (vec![], "the host closed the connection"),
        (
            vec![GREETING, "{\"want\":\"moon\"}"],
            "what its version 0.1.0 of bosh-qemu-cpi says is not understood here",
        ),
        (vec![GREETING, MADE_ANOTHER], "says that it made something else than 'stemcell-"),
        (vec![GREETING, "{\"answer\":{\"text\":\"{}\"}}"], "gave no answer of a CPI"),
        (vec![GREETING, "{\"answer\":{\"text\":\"7\"}}"], "gave no answer of a CPI"),
        (vec![GREETING], "the host closed the connection"),
    ] {
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = says.first() == Some(&GREETING);
        let host = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            for line in &says {
                stream.write_all(format!("{line}\n").as_bytes()).unwrap();
            }
            if says.len() > 1 || says.first() == Some(&GREETING) {
                let mut question = String::new();
                let _ = BufReader::new(&stream).read_line(&mut question);
            }
        });
        let answer = pair.office.call("create_stemcell", &json!([image, {}]));
        host.join().unwrap();
        let message = &answer.failure().message;
        assert!(
            message.contains(expected) && message.contains(socket.to_str().unwrap()),
            "{expected}: {message}"
        );
        // What it may have made all the same is to be removed, which can not be asked of it any more.
        assert_eq!(message.contains("`delete_stemcell` removes it"), asked, "{message}");
        assert!(!answer.outcome.as_ref().is_err_and(|failure| failure.ok_to_retry), "{answer:?}");
    }
}

/// An answer that tells of something else than was to be made.
const MADE_ANOTHER: &str = r#"{"answer":{"text":"{\"result\":\"stemcell-aaaaaaaaaaaaaaa\",\"error\":null,\"log\":\"\"}"}}"#;

/// An older version says this.
#[test]
fn a_host_of_an_older_version_is_not_asked_what_it_would_not_keep_to() {
    let Some(office) = crate::support::doors::Office::new() else { return };
    let socket = office.path("fake.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    office.configure(
        &json!({"hosts": [{"name": "kvm-0", "transport": {"kind": "unix", "socket": socket}}]}),
    );
    let host = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(format!("{GREETING}\n").as_bytes()).unwrap();
        let mut question = String::new();
        BufReader::new(&stream).read_line(&mut question).unwrap();
        question
    });
    let refused =
        office.call("delete_vm", &json!([bosh_qemu_cpi::cid::VmCid::random_on_host("kvm-0")]));
    let message = &refused.failure().message;
    assert!(
        message
            .contains("host 'kvm-0': its version 0.1.0 of bosh-qemu-cpi is too old for this call"),
        "{message}"
    );
    assert_eq!(host.join().unwrap(), "");
}

pub const GREETING: &str = "{\"greeting\":{\"program\":\"bosh-qemu-cpi\",\"version\":\"0.1.0\"}}";
