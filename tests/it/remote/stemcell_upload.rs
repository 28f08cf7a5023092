//! Transfer of a stemcell's image to the host.

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

/// A bootable disk of `mib` MiB that does not compress, on the caller's machine.
fn disk(pair: &Pair, name: &str, mib: usize) -> PathBuf {
    let mut bytes = vec![0; mib << 20];
    let mut state = 1u32;
    for byte in &mut bytes[1 << 19..] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    bytes[..GUEST.len()].copy_from_slice(GUEST);
    let path = pair.director.path(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn create(pair: &Pair, image: &Path) -> StemcellCid {
    StemcellCid::parse(&text(&pair.director.ok("create_stemcell", &json!([image, {}])))).unwrap()
}

fn imported(pair: &Pair, stemcell: &StemcellCid) -> PathBuf {
    pair.host.store().stemcell_dir(stemcell).join("image.raw")
}

fn remove(pair: &Pair, stemcells: &[StemcellCid]) {
    for stemcell in stemcells {
        pair.director.ok("delete_stemcell", &json!([stemcell]));
    }
}

#[test]
fn upload_known_stemcell_is_not_sent_again() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 8);
    let first = create(&pair, &image);
    assert_eq!(fs::read(imported(&pair, &first)).unwrap(), fs::read(&image).unwrap());
    let again = pair.director.call("create_stemcell", &json!([image, {}]));
    assert!(again.stderr.contains("sharing the image"), "{again:?}");
    let second = StemcellCid::parse(&text(again.result())).unwrap();
    // Another image of the same size: the host asks for its digest, then for its bytes.
    let other = disk(&pair, "other", 8);
    let mut bytes = fs::read(&other).unwrap();
    bytes[1 << 20] ^= 1;
    fs::write(&other, &bytes).unwrap();
    let third = create(&pair, &other);
    assert_eq!(fs::read(imported(&pair, &third)).unwrap(), bytes);
    remove(&pair, &[first, second, third]);
}

#[test]
fn upload_compressed_stemcell_arrives_decoded() {
    let Some(pair) = Pair::new() else { return };
    let raw = disk(&pair, "raw", 4);
    let wanted = fs::read(&raw).unwrap();
    let zipped = pair.director.path("zipped.gz");
    let output = Command::new("gzip").arg("-c").arg(&raw).output().unwrap();
    fs::write(&zipped, output.stdout).unwrap();
    // The host asks twice for the bytes of this image.
    let zstd = pair.director.path("zstd");
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
fn upload_invalid_stemcell_is_refused_while_it_is_sent() {
    let Some(pair) = Pair::new() else { return };
    let image = pair.director.path("noise");
    fs::write(&image, vec![7; 32 << 20]).unwrap();
    for (image, words) in [
        (image, "it is neither qcow2 nor a disk with a boot signature"),
        (pair.director.path("empty"), "it is empty"),
        (pair.director.path("nothing"), "No such file"),
        (pair.director.path(""), "is not a regular file"),
    ] {
        if image.ends_with("empty") {
            fs::write(&image, "").unwrap();
        }
        let refused = pair.director.call("create_stemcell", &json!([image, {}]));
        assert!(refused.failure().message.contains(words), "{refused:?}");
    }
    assert_eq!(pair.host.store().list::<bosh_qemu_cpi::store::StemcellRecord>().unwrap(), []);
}

#[test]
fn upload_interrupted_stemcell_leaves_nothing() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 64);
    let mut call = pair.director.start("create_stemcell", &json!([image, {}]));
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

/// A caller sends other bytes than those of its digest.
#[test]
fn upload_damaged_stemcell_is_refused() {
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
    assert!(said.contains("was damaged in transfer"), "{said}");
    assert_eq!(pair.host.store().list::<bosh_qemu_cpi::store::StemcellRecord>().unwrap(), []);
}

/// Hosts that break the protocol.
#[test]
fn upload_stemcell_to_misbehaving_host_names_the_fault() {
    let Some(pair) = Pair::new() else { return };
    let image = disk(&pair, "image", 1);
    let socket = pair.director.path("fake.sock");
    pair.director.configure(&json!({"transport": {"kind": "unix", "socket": socket}}));
    for (says, expected) in [
        (
            vec!["{\"greeting\":{\"program\":\"telnetd\",\"version\":\"1\"}}"],
            "the program that answers there is not bosh-qemu-cpi",
        ),
        (vec!["Welcome to Ubuntu"], "the program that answers there is not bosh-qemu-cpi"),
        (vec![], "the host closed the connection"),
        (
            vec![GREETING, "{\"want\":\"moon\"}"],
            "its version 0.1.0 of bosh-qemu-cpi sent an unknown message",
        ),
        (vec![GREETING, MADE_ANOTHER], "created another object than 'stemcell-"),
        (vec![GREETING, "{\"answer\":{\"text\":\"{}\"}}"], "sent no CPI response"),
        (vec![GREETING, "{\"answer\":{\"text\":\"7\"}}"], "sent no CPI response"),
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
        let answer = pair.director.call("create_stemcell", &json!([image, {}]));
        host.join().unwrap();
        let message = &answer.failure().message;
        assert!(
            message.contains(expected) && message.contains(socket.to_str().unwrap()),
            "{expected}: {message}"
        );
        // The host may have created the stemcell and no longer answers, so the error says how to
        // remove it.
        assert_eq!(message.contains("`delete_stemcell` removes it"), asked, "{message}");
        assert!(!answer.outcome.as_ref().is_err_and(|failure| failure.ok_to_retry), "{answer:?}");
    }
}

/// A host that wants the image again and again would keep its caller until the deadline.
#[test]
fn upload_stemcell_to_host_that_wants_it_without_end_fails() {
    let Some(director) = crate::support::remote::Director::new() else { return };
    let (image, socket) = (director.path("image"), director.path("fake.sock"));
    fs::write(&image, "x").unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    director.configure(&json!({"transport": {"kind": "unix", "socket": socket}}));
    let host = std::thread::spawn(move || {
        // The second connection has the delete of what the host may have created.
        let mut stream = listener.accept().unwrap().0;
        let mut wanted = 0;
        stream.write_all(format!("{GREETING}\n").as_bytes()).unwrap();
        while stream.write_all(b"{\"want\":\"image\"}\n").is_ok() && wanted < 1000 {
            wanted += 1;
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).unwrap_or(0) == 0 {
                break;
            }
        }
        wanted
    });
    let answer = director.call("create_stemcell", &json!([image, {}]));
    let message = &answer.failure().message;
    assert!(message.contains("it asked for the image more than 3 times"), "{message}");
    assert!(host.join().unwrap() < 1000);
}

/// An answer with another cid than the caller chose.
const MADE_ANOTHER: &str = concat!(
    r#"{"answer":{"text":"{\"result\":\"stemcell-aaaaaaaaaaaaaaa\","#,
    r#"\"error\":null,\"log\":\"\"}"}}"#
);

/// The greeting of an older version has no protocol level.
#[test]
fn call_to_older_host_is_refused_before_it_is_sent() {
    let Some(director) = crate::support::remote::Director::new() else { return };
    let socket = director.path("fake.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    director.configure(
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
        director.call("delete_vm", &json!([bosh_qemu_cpi::cid::VmCid::random_on_host("kvm-0")]));
    let message = &refused.failure().message;
    assert!(
        message
            .contains("host 'kvm-0': its version 0.1.0 of bosh-qemu-cpi is too old for this call"),
        "{message}"
    );
    assert_eq!(host.join().unwrap(), "");
}

pub const GREETING: &str = "{\"greeting\":{\"program\":\"bosh-qemu-cpi\",\"version\":\"0.1.0\"}}";
