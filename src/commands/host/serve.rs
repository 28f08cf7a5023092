//! `bosh-qemu-cpi host serve`: answer one question of a caller elsewhere. Started for each by sshd, as a forced command, or
//! by a socket unit with `Accept=yes`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::config::{self, Config, TransportKind};
use crate::cpi::{Afar, Cpi};
use crate::error::{Error, ErrorKind, Result};
use crate::log;
use crate::remote::host::Caller;
use crate::remote::wire::{CallQuestion, Question};
use crate::rpc::outlet::{self, Outlet};
use crate::rpc::request::Request;
use crate::rpc::{self, Carrier, Here};

/// Greets, hears one question and answers it.
///
/// # Errors
/// Only when standard output can not be had or nobody listens; every other failure is an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let output = outlet::take_stdout()?;
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(|e| Error::os("duplicate standard input", e))?;
    let caller = Caller::greet(File::from(input), output).map_err(|e| Error::os("greet the caller", e))?;
    let outlet = Outlet::new(caller.clone());
    match caller.question() {
        Ok(Question::Call(call)) => answer_call(config, call, &caller, outlet),
        Err(error) => {
            let _ = outlet.send(&rpc::response::Response::failure(&error), false);
        }
    }
    Ok(())
}

fn answer_call(config: Option<&Path>, call: CallQuestion, caller: &Caller, outlet: Outlet) {
    let CallQuestion { request, cid, image } = call;
    rpc::serve_text(request, outlet, |request| {
        let (config, file) = load(config)?;
        log::init_to(&config.log, caller.log());
        tracing::info!("called by {}", who(io::stdin().as_fd()));
        let config = config.with_context(request.context.properties(), config::HOST_KEYS)?;
        let image = image.map(|size| caller.image(image_name(request), size));
        let afar = Afar { cid, image: image.map(|image| Box::new(image) as _) };
        let cpi = Cpi::new(config, file).called_by(request.context.director()).from_afar(afar);
        Ok(Box::new(Here::new(cpi)) as Box<dyn Carrier>)
    });
}

fn load(config: Option<&Path>) -> Result<(Config, Option<PathBuf>)> {
    let file = config::file(config);
    let config = Config::load(file.as_deref())?;
    if config.transport.kind != TransportKind::Local || !config.hosts.is_empty() {
        let message = "this machine is no host: its configuration sends calls elsewhere";
        return Err(Error::new(ErrorKind::BadConfig, message).hint("take 'transport' and 'hosts' out of it"));
    }
    Ok((config, file))
}

/// What the image of create_stemcell is called on the caller's machine.
fn image_name(request: &Request) -> String {
    let name = request.arguments.first().and_then(|path| serde_json::from_str::<String>(path.get()).ok());
    name.unwrap_or_default()
}

/// Who calls: a process of this machine, behind a socket, or what sshd says of its client.
fn who(input: BorrowedFd<'_>) -> String {
    if let Ok(peer) = getsockopt(&input, PeerCredentials) {
        return format!("uid {}, gid {}, pid {}", peer.uid(), peer.gid(), peer.pid());
    }
    match std::env::var("SSH_CONNECTION") {
        Ok(connection) => {
            let address = connection.split(' ').next().unwrap_or_default();
            format!("{} through ssh", crate::schema::printable(address))
        }
        Err(_) => "somebody on standard input".to_owned(),
    }
}
