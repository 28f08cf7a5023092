//! Random calls, crashes and power cuts, checked against a model of the host's state.
//!
//! Each step is one action of a Director, an operator or a fault. A third of the calls are killed
//! at one of their crash points. Then another step may follow before the call is repeated or
//! reverted, as a Director would do. After every step the host must match the model: has_vm,
//! has_disk, get_disks, `vm list`, the records and QEMU itself are asked, and disks and snapshots
//! must hold the written data.
//!
//! A step draws its random numbers from the seed and the number of the step, so a run can be
//! repeated:
//!
//! ```text
//! BOSH_QEMU_CPI_MODEL_SEED=7 BOSH_QEMU_CPI_MODEL_STEPS=500 \
//!     cargo nextest run --no-capture model::
//! ```
//!
//! A new method needs a function in [`steps`] or [`disks`] and a line in the table of the former.
//! Its effect belongs into [`modelled_host::ModelledHost`].

mod disks;
mod modelled_host;
mod random;
mod steps;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use modelled_host::ModelledHost;
use random::Random;

/// Duration of a run without [`STEPS_VARIABLE`]. The last step may exceed it.
const RUN_TIMEOUT: Duration = Duration::from_secs(15);
/// Environment variable with the seed of a run to repeat.
const SEED_VARIABLE: &str = "BOSH_QEMU_CPI_MODEL_SEED";
/// Environment variable with the number of steps. It replaces [`RUN_TIMEOUT`].
const STEPS_VARIABLE: &str = "BOSH_QEMU_CPI_MODEL_STEPS";

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

#[test]
#[allow(clippy::print_stdout)]
fn run_random_steps_matches_the_model() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let (seed, wanted) = (number(SEED_VARIABLE).unwrap_or_else(now), number(STEPS_VARIABLE));
    let Some(mut modelled) = ModelledHost::new() else { return };
    let began = Instant::now();
    let mut done = 0;
    while wanted.map_or(began.elapsed() < RUN_TIMEOUT, |wanted| done < wanted) {
        // Printed before the step, so that the output of a failed test ends with the failing step.
        println!("{SEED_VARIABLE}={seed} step {done} after {:.1} s", began.elapsed().as_secs_f64());
        let mut random = Random::new(seed, done);
        steps::pick_step(&mut random)(&mut modelled, &mut random);
        modelled.check();
        done += 1;
    }
    println!(
        "{SEED_VARIABLE}={seed}: {done} steps, {} calls killed, {} power cuts",
        modelled.killed, modelled.power_cuts
    );
}
