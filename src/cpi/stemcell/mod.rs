//! Stemcells: imported images, and images of the operator's that light stemcells name.

mod create;
mod delete;
mod find;
mod format;
mod light;
mod recover;
mod share;

pub(super) use create::create;
pub(super) use delete::delete;
pub(super) use find::find;
pub use light::LightStemcell;
pub(super) use recover::recover;
