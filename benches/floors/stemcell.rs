//! Import of a stemcell, compared with the shell commands for the same.

use std::fs::File;
use std::io::{BufWriter, Write};

use serde_json::json;

use crate::lab::{self, Lab};
use crate::table::{Table, Target};
use crate::timed;

/// Size of the image, bytes. A third is data, as in a real stemcell.
const IMAGE: u64 = 768 << 20;
const DATA: u64 = 256 << 20;

/// Imports a stemcell as BOSH publishes them: a compressed qcow2 in a gzipped archive.
pub fn import(lab: &Lab, table: &mut Table, rounds: u32) {
    let (raw, qcow2, archive) =
        (lab.scratch("root.raw"), lab.scratch("root.img"), lab.scratch("image.tgz"));
    let dir = lab.state.path().to_str().expect("UTF-8");
    make_raw(&raw).expect("make an image");
    lab::run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", "compat=0.10", &raw, &qcow2]);
    lab::run("tar", &["-C", dir, "-czf", &archive, "root.img"]);
    for _ in 0..rounds {
        // create_stemcell removes the archive.
        let given = lab.scratch("given.tgz");
        std::fs::copy(&archive, &given).expect("copy the archive");
        let (cpi, stemcell) =
            lab.call("create_stemcell", &json!([given, {"disk_format": "qcow2"}]));
        lab.call("delete_stemcell", &json!([stemcell]));
        let (floor, ()) = timed(|| {
            lab::run("tar", &["-C", dir, "-xzf", &archive]);
            lab::run(
                "qemu-img",
                &["convert", "-O", "qcow2", &qcow2, &lab.scratch("converted.qcow2")],
            );
        });
        table.add("create_stemcell, 256 MiB of data", Target::Ratio(0.8), cpi, floor);
    }
}

/// Writes half text, half noise, with holes between: it compresses about as well as programs do.
fn make_raw(path: &str) -> std::io::Result<()> {
    let file = File::create(path)?;
    file.set_len(IMAGE)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut state = 1_u64;
    for number in 0..DATA / 16 {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
        file.write_all(&(number / 64).to_le_bytes())?;
    }
    file.flush()
}
