//! Random calls, crashes and power cuts against a model that says what must be there.
//!
//! Each step is one thing a Director, an operator or bad luck does. A third of the calls are killed at one of their crash
//! points; then, often, something else happens before the call is repeated or taken back, as a Director would. After every step
//! the host must be what the model says: asked through has_vm, has_disk, get_disks, `vm list`, the records and QEMU itself;
//! disks and snapshots have the data that was written.
//!
//! A step draws its chances from the seed and its own number, so a run can be repeated:
//!
//! ```text
//! BOSH_QEMU_CPI_MODEL_SEED=7 BOSH_QEMU_CPI_MODEL_STEPS=500 cargo nextest run --no-capture model::
//! ```
//!
//! A new verb is a function in [`steps`] or [`disks`] and a line in the table of the former; what it changes goes into [`modelled::ModelledHost`].

mod disks;
mod modelled_host;
mod random;
mod steps;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use modelled_host::ModelledHost;
use random::Random;

/// How long a run without [`STEPS`] takes at the most, but for its last step.
const SHORT: Duration = Duration::from_secs(15);
/// What to repeat.
const SEED: &str = "BOSH_QEMU_CPI_MODEL_SEED";
/// How many steps to do, however long they take.
const STEPS: &str = "BOSH_QEMU_CPI_MODEL_STEPS";

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

#[test]
#[allow(clippy::print_stdout)]
fn run_random_steps_matches_the_model() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let (seed, wanted) = (number(SEED).unwrap_or_else(now), number(STEPS));
    let Some(mut modelled) = ModelledHost::new() else { return };
    let began = Instant::now();
    let mut done = 0;
    while wanted.map_or(began.elapsed() < SHORT, |wanted| done < wanted) {
        // Printed first: what is shown of a test that failed ends with the step that did it.
        println!("{SEED}={seed} step {done} after {:.1} s", began.elapsed().as_secs_f64());
        let mut random = Random::new(seed, done);
        steps::any(&mut random)(&mut modelled, &mut random);
        modelled.check();
        done += 1;
    }
    println!(
        "{SEED}={seed}: {done} steps, {} calls killed, {} power cuts",
        modelled.killed, modelled.power_cuts
    );
}
