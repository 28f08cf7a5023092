//! `bosh-qemu-cpi host serve`: answers one question of a remote caller. sshd (as a forced command)
//! or a socket unit with `Accept=yes` starts one process for each connection.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::proxy;
use super::syslog::{self, Syslog};
use crate::cid::DiskCid;
use crate::commands::local;
use crate::config::{self, Config};
use crate::cpi::capacity::report::{self, HostQuery, HostReport};
use crate::cpi::context::{Context, RemoteCall};
use crate::cpi::{Cpi, presence};
use crate::error::{Error, Result};
use crate::log;
use crate::remote::protocol::{CallRequest, ClientRequest, ServerMessage};
use crate::remote::server::{self, Caller};
use crate::rpc::request::Request;
use crate::rpc::response::Response;
use crate::rpc::response_writer::{self, ResponseWriter};
use crate::rpc::{self, Executor, LocalExecutor};
use crate::schema::printable;

/// Sends the greeting, reads one question and answers it. For a user other than root the proxy
/// forwards the connection to a process of root instead.
///
/// # Errors
/// Only if standard output cannot be duplicated or the caller has closed it; every other failure is
/// an answer.
pub fn run(config: Option<&Path>) -> Result<()> {
    let output = response_writer::take_stdout()?;
    if !geteuid().is_root() {
        return proxy::to_root(output);
    }
    let input = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("duplicate standard input", e))?;
    let caller =
        Caller::greet(File::from(input), output).map_err(|e| Error::os("greet the caller", e))?;
    let writer = ResponseWriter::new(caller.clone());
    match caller.receive_request(server::REQUEST_TIMEOUT) {
        Ok(ClientRequest::Call(call)) if is_absent(config, &call) => {
            caller.send(&ServerMessage::Absent).map_err(caller_closed)
        }
        Ok(ClientRequest::Call(call)) => {
            answer_call(config, call, &caller, writer);
            Ok(())
        }
        Ok(ClientRequest::Report(query)) => match host_report(config, &query) {
            Ok(report) => {
                caller.send(&ServerMessage::Report(Box::new(report))).map_err(caller_closed)
            }
            Err(error) => refuse(&error, &writer),
        },
        Ok(ClientRequest::ReleaseDisk(disk)) => match release_disk(config, &caller, &disk) {
            Ok(()) => caller.send(&ServerMessage::DiskReleased).map_err(caller_closed),
            Err(error) => refuse(&error, &writer),
        },
        Ok(ClientRequest::Find(cids)) => match find(config, &cids) {
            Ok(found) => caller.send(&ServerMessage::Found(found)).map_err(caller_closed),
            Err(error) => refuse(&error, &writer),
        },
        Err(error) => refuse(&error, &writer),
    }
}

fn caller_closed(error: io::Error) -> Error {
    Error::os("answer the caller", error)
}

fn refuse(error: &Error, writer: &ResponseWriter) -> Result<()> {
    let _ = writer.send(&Response::failure(error), false);
    Ok(())
}

/// Whether the call is only for a host that has certain objects, and this host lacks one of them.
/// Returns false if that cannot be determined: the call then fails with the reason.
fn is_absent(config: Option<&Path>, call: &CallRequest) -> bool {
    if call.only_with.is_empty() {
        return false;
    }
    local::config(config).is_ok_and(|(config, file)| {
        let cx = Context::new(config, file);
        !call.only_with.iter().all(|cid| presence::is_present(&cx, cid).unwrap_or(true))
    })
}

fn find(config: Option<&Path>, cids: &[String]) -> Result<Vec<String>> {
    let (config, file) = local::config(config)?;
    presence::present(&Context::new(config, file), cids)
}

fn release_disk(config: Option<&Path>, caller: &Caller, cid: &DiskCid) -> Result<()> {
    let (config, file) = local::config(config)?;
    begin_log(&config, caller, None);
    Cpi::new(Context::new(config, file)).release_disk(cid)
}

fn host_report(config: Option<&Path>, query: &HostQuery) -> Result<HostReport> {
    let (config, file) = local::config(config)?;
    report::report(&Context::new(config, file), query)
}

fn answer_call(config: Option<&Path>, call: CallRequest, caller: &Caller, writer: ResponseWriter) {
    let CallRequest { request, cid, same_group, replicated, cancels, image, .. } = call;
    rpc::serve_text(request, writer, |request| {
        let (config, file) = local::config(config)?;
        begin_log(&config, caller, request.context.request_id());
        let context = config::without_unknown_deadlines(request.context.properties());
        let config = config.with_context(&context, config::HOST_KEYS)?;
        let image = image.map(|size| caller.image(image_name(request), size));
        let image = image.map(|image| Box::new(image) as _);
        let remote = RemoteCall { cid, same_group, replicated, cancels, image };
        let cx = Context::new(config, file).called_by(request.context.director()).remote(remote);
        Ok(Box::new(LocalExecutor::new(Cpi::new(cx))) as Box<dyn Executor>)
    });
}

/// Sends the call's log both to the caller and to this host's own log. Its first line names the
/// caller and its id of the request.
fn begin_log(config: &Config, caller: &Caller, request_id: Option<&str>) {
    let peer = peer(io::stdin().as_fd());
    match peer {
        Peer::Process(_) => log::init_to(&config.log, Tee(caller.log(), io::stderr())),
        // sshd sends standard error to the caller, who has the log already.
        Peer::Remote(_) => {
            log::init_to(&config.log, Tee(caller.log(), Syslog::at(Path::new(syslog::SOCKET))));
        }
    }
    tracing::info!(request_id, "called by {peer}");
}

/// The path of create_stemcell's image on the caller's machine.
fn image_name(request: &Request) -> String {
    let name =
        request.arguments.first().and_then(|path| serde_json::from_str::<String>(path.get()).ok());
    name.unwrap_or_default()
}

/// The caller, for the log.
enum Peer {
    /// A process of this machine on the unix socket, with credentials from the kernel.
    Process(UnixCredentials),
    /// The address at the other end of sshd's connection, from `SSH_CONNECTION`.
    Remote(Option<String>),
}

fn peer(input: BorrowedFd<'_>) -> Peer {
    if let Ok(peer) = getsockopt(&input, PeerCredentials) {
        return Peer::Process(peer);
    }
    let connection = std::env::var("SSH_CONNECTION").ok();
    Peer::Remote(connection.map(|words| printable(words.split(' ').next().unwrap_or_default())))
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(peer) => {
                write!(f, "uid {}, gid {}, pid {}", peer.uid(), peer.gid(), peer.pid())
            }
            Self::Remote(Some(address)) => write!(f, "{address} over ssh"),
            Self::Remote(None) => f.write_str("an unknown caller on standard input"),
        }
    }
}

/// Writes everything to two writers.
struct Tee<A, B>(A, B);

impl<A: Write, B: Write> Write for Tee<A, B> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // An error of one writer does not keep the line from the other.
        let (one, other) = (self.0.write_all(line), self.1.write_all(line));
        one.and(other).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().and(self.1.flush())
    }
}
