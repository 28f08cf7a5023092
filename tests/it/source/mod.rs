//! Rules about the source, the documentation and the BOSH release.

mod docs;
mod layers;
mod release;
