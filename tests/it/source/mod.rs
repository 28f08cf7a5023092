//! Rules about the source, the documentation and the BOSH release.

mod docs;
mod house;
mod layers;
mod reader;
mod release;
mod words;
