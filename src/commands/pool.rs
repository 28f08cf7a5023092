//! `bosh-qemu-cpi pool list`: how full the state directory and each pool is.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::local;
use super::table::table;
use crate::cpi::capacity::usage::{self, PoolUsage};
use crate::error::{Error, Result};

/// Name of the state directory in the table. No pool can have this name.
const STATE_DIRECTORY: &str = "(state_dir)";

/// Prints a table or, with `as_json`, an array with sizes in bytes. Returns true if the state
/// directory and every pool can be used.
pub fn list(config: Option<&Path>, as_json: bool, output: &mut dyn Write) -> Result<bool> {
    let cx = local::context(config)?;
    let usage = usage::all(&cx);
    let text = if as_json {
        let array: Vec<_> = usage.iter().map(|(pool, usage)| as_object(*pool, usage)).collect();
        serde_json::to_string_pretty(&array).expect("plain data") + "\n"
    } else {
        let head =
            ["POOL", "PATH", "CAPACITY", "FREE", "ALLOCATED", "VIRTUAL SIZE", "MAY GROW", "STATUS"];
        let rows = usage.iter().map(|(pool, usage)| cells(*pool, usage));
        table(&std::iter::once(head.map(str::to_owned)).chain(rows).collect::<Vec<_>>())
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the pools", e))?;
    Ok(usage.iter().all(|(_, usage)| usage.is_ok()))
}

fn as_object(pool: Option<&str>, usage: &Result<PoolUsage>) -> Value {
    match usage {
        Ok(usage) => json!({
            "pool": pool, "path": usage.path, "capacity": usage.capacity, "free": usage.free,
            "allocated": usage.allocated, "virtual_size": usage.virtual_size,
            "growth": usage.growth, "watermark": usage.watermark(),
        }),
        Err(error) => json!({"pool": pool, "error": error.report()}),
    }
}

fn cells(pool: Option<&str>, usage: &Result<PoolUsage>) -> [String; 8] {
    let pool = pool.unwrap_or(STATE_DIRECTORY).to_owned();
    let usage = match usage {
        Ok(usage) => usage,
        Err(error) => {
            let mut cells = std::array::from_fn(|_| "-".to_owned());
            (cells[0], cells[7]) = (pool, error.report().replace('\n', " "));
            return cells;
        }
    };
    [
        pool,
        usage.path.display().to_string(),
        usage.capacity.rounded(),
        usage.free.rounded(),
        usage.allocated.rounded(),
        usage.virtual_size.rounded(),
        usage.growth.rounded(),
        usage.watermark().as_str().to_owned(),
    ]
}
