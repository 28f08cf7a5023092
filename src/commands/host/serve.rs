//! `bosh-qemu-cpi host serve`: answer one question of a caller elsewhere. Started for each by sshd, as a forced command, or
//! by a socket unit with `Accept=yes`.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::pass_on;
use super::syslog::{self, Syslog};
use crate::cid::DiskCid;
use crate::commands::this_host;
use crate::config::{self, Config};
use crate::cpi::offer::{Offer, Wish};
use crate::cpi::{Afar, Cpi};
use crate::error::{Error, Result};
use crate::log;
use crate::remote::protocol::{CallRequest, ClientRequest, ServerMessage};
use crate::remote::server::Caller;
use crate::rpc::outlet::{self, Outlet};
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::{self, Carrier, Here};
use crate::schema::printable;

/// Greets, hears one question and answers it. A user who is not root has that done behind the socket that is there for such.
///
/// # Errors
/// Only when standard output can not be had or nobody listens; every other failure is an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let output = outlet::take_stdout()?;
    if !geteuid().is_root() {
        return pass_on::to_root(output);
    }
    let input = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("duplicate standard input", e))?;
    let caller =
        Caller::greet(File::from(input), output).map_err(|e| Error::os("greet the caller", e))?;
    let outlet = Outlet::new(caller.clone());
    match caller.receive_request() {
        Ok(ClientRequest::Call(call)) if is_absent(config, &call) => {
            caller.send(&ServerMessage::Absent).map_err(gone)
        }
        Ok(ClientRequest::Call(call)) => {
            answer_call(config, call, &caller, outlet);
            Ok(())
        }
        Ok(ClientRequest::Report(wish)) => match offer(config, &wish) {
            Ok(offer) => caller.send(&ServerMessage::Report(Box::new(offer))).map_err(gone),
            Err(error) => refuse(&error, &outlet),
        },
        Ok(ClientRequest::ReleaseDisk(disk)) => match give_up(config, &caller, &disk) {
            Ok(()) => caller.send(&ServerMessage::DiskReleased).map_err(gone),
            Err(error) => refuse(&error, &outlet),
        },
        Ok(ClientRequest::Find(cids)) => match find(config, &cids) {
            Ok(found) => caller.send(&ServerMessage::Found(found)).map_err(gone),
            Err(error) => refuse(&error, &outlet),
        },
        Err(error) => refuse(&error, &outlet),
    }
}

fn gone(error: io::Error) -> Error {
    Error::os("answer the caller", error)
}

fn refuse(error: &Error, outlet: &Outlet) -> Result<()> {
    let _ = outlet.send(&Response::failure(error), false);
    Ok(())
}

/// Whether the call is for a host with things that are not here. If that can not be said, the call says why.
fn is_absent(config: Option<&Path>, call: &CallRequest) -> bool {
    if call.only_with.is_empty() {
        return false;
    }
    this_host::config(config).is_ok_and(|(config, file)| {
        let cpi = Cpi::new(config, file);
        // If it can not be told, the call tells why.
        !call.only_with.iter().all(|cid| cpi.has_of(cid).unwrap_or(true))
    })
}

fn find(config: Option<&Path>, cids: &[String]) -> Result<Vec<String>> {
    let (config, file) = this_host::config(config)?;
    Cpi::new(config, file).found(cids)
}

fn give_up(config: Option<&Path>, caller: &Caller, disk: &DiskCid) -> Result<()> {
    let (config, file) = this_host::config(config)?;
    begin_log(&config, caller);
    Cpi::new(config, file).give_up_disk(disk)
}

fn offer(config: Option<&Path>, wish: &Wish) -> Result<Offer> {
    let (config, file) = this_host::config(config)?;
    Cpi::new(config, file).offer(wish)
}

fn answer_call(config: Option<&Path>, call: CallRequest, caller: &Caller, outlet: Outlet) {
    let CallRequest { request, cid, same_group, replicated, cancels, image, .. } = call;
    rpc::serve_text(request, outlet, |request| {
        let (config, file) = this_host::config(config)?;
        begin_log(&config, caller);
        let config = config.with_context(request.context.properties(), config::HOST_KEYS)?;
        let image = image.map(|size| caller.image(image_name(request), size));
        let image = image.map(|image| Box::new(image) as _);
        let afar = Afar { cid, alike: same_group, everywhere: replicated, undoes: cancels, image };
        let cpi = Cpi::new(config, file).called_by(request.context.director()).from_afar(afar);
        Ok(Box::new(Here::new(cpi)) as Box<dyn Carrier>)
    });
}

/// The log of what a caller has done here, which begins with who that is: the caller's, and this host's own.
fn begin_log(config: &Config, caller: &Caller) {
    let peer = peer(io::stdin().as_fd());
    match peer {
        Peer::Process(_) => log::init_to(&config.log, Both(caller.log(), io::stderr())),
        // Standard error would be told to the caller, too.
        Peer::Elsewhere(_) => {
            log::init_to(&config.log, Both(caller.log(), Syslog::at(Path::new(syslog::SOCKET))))
        }
    }
    tracing::info!("called by {peer}");
}

/// What the image of create_stemcell is called on the caller's machine.
fn image_name(request: &Request) -> String {
    let name =
        request.arguments.first().and_then(|path| serde_json::from_str::<String>(path.get()).ok());
    name.unwrap_or_default()
}

/// Who calls.
enum Peer {
    /// A process of this machine, behind a socket: the kernel says whose it is.
    Process(UnixCredentials),
    /// Whoever is at the other end of sshd's connection, as it says.
    Elsewhere(Option<String>),
}

fn peer(input: BorrowedFd<'_>) -> Peer {
    if let Ok(peer) = getsockopt(&input, PeerCredentials) {
        return Peer::Process(peer);
    }
    let connection = std::env::var("SSH_CONNECTION").ok();
    Peer::Elsewhere(connection.map(|words| printable(words.split(' ').next().unwrap_or_default())))
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(peer) => {
                write!(f, "uid {}, gid {}, pid {}", peer.uid(), peer.gid(), peer.pid())
            }
            Self::Elsewhere(Some(address)) => write!(f, "{address} through ssh"),
            Self::Elsewhere(None) => f.write_str("somebody on standard input"),
        }
    }
}

/// Writes everything twice.
struct Both<A, B>(A, B);

impl<A: Write, B: Write> Write for Both<A, B> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Neither keeps the other from it.
        let (one, other) = (self.0.write_all(line), self.1.write_all(line));
        one.and(other).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().and(self.1.flush())
    }
}
