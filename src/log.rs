//! The log on standard error: events of this program, at most 64 KiB per process.
//!
//! Callers copy standard error into their task logs, whose readers may not see secrets. The
//! Director reads it one byte at a time, which takes about 4 s per MB. So an event has no value of
//! a request. Events of dependencies, which may trace bytes for QEMU or the kernel, are left out.
//! The log has no colours and a maximal length.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;

use crate::config::{Log, LogFormat, LogLevel};
use crate::schema::{escaped_json, escaped_line, plain};

/// Most bytes of events that a process writes.
const MAX_BYTES: usize = 64 << 10;

/// Starts the log on standard error. A second call changes nothing.
pub fn init(log: &Log) {
    init_to(log, io::stderr());
}

/// Starts the log on `writer`, which gets one line at a time.
pub fn init_to(log: &Log, writer: impl Write + Send + 'static) {
    let writer = Mutex::new(Bounded::new(writer, log.format));
    // Fails only if a subscriber is set already.
    let _ = tracing::subscriber::set_global_default(subscriber(log, writer));
}

/// Writes a line of a remote host's log to standard error.
pub fn relay(line: &str) {
    static RELAYED: Mutex<Option<Bounded<io::Stderr>>> = Mutex::new(None);
    let mut relayed = RELAYED.lock().unwrap_or_else(PoisonError::into_inner);
    let stderr = relayed.get_or_insert_with(|| Bounded::new(io::stderr(), LogFormat::Text));
    // The host is not trusted: control characters become spaces, and the text stays on one line.
    let line = plain(line).replace('\n', " ") + "\n";
    let _ = stderr.write_all(line.as_bytes());
}

/// A subscriber that writes this program's events to `writer`, each on one line with its spans.
fn subscriber<W>(log: &Log, writer: W) -> impl Subscriber + use<W>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = fmt::layer().with_writer(writer).with_ansi(false).with_target(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    let own_events = Targets::new().with_target(env!("CARGO_CRATE_NAME"), level(log.level));
    Registry::default().with(lines.with_filter(own_events))
}

fn level(level: LogLevel) -> Level {
    match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    }
}

/// A writer of lines, which it writes without control characters. It drops all lines after
/// [`MAX_BYTES`], with one notice. It never fails: a caller that has closed standard error still
/// gets its response.
struct Bounded<W> {
    inner: W,
    format: LogFormat,
    left: usize,
    notice: &'static str,
}

impl<W> Bounded<W> {
    fn new(inner: W, format: LogFormat) -> Self {
        let notice = match format {
            LogFormat::Text => "further log lines dropped\n",
            LogFormat::Json => "{\"level\":\"WARN\",\"message\":\"further log lines dropped\"}\n",
        };
        Self { inner, format, left: MAX_BYTES, notice }
    }
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = one_line(line, self.format);
        if let Some(left) = self.left.checked_sub(written.len()) {
            self.left = left;
            let _ = self.inner.write_all(written.as_bytes());
        } else {
            self.left = 0;
            let notice = std::mem::take(&mut self.notice);
            let _ = self.inner.write_all(notice.as_bytes());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.inner.flush();
        Ok(())
    }
}

/// The line of one event. Texts of requests, images and guests in it cannot move a terminal's
/// cursor, begin a line of their own or show in another order.
fn one_line(line: &[u8], format: LogFormat) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = match format {
        LogFormat::Text => escaped_line(text),
        LogFormat::Json => escaped_json(text),
    };
    text.into_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The log of `act`.
    fn written(level: LogLevel, format: LogFormat, act: impl FnOnce()) -> String {
        let written = Written::default();
        let log = Log { level, format };
        let writer = Mutex::new(Bounded::new(written.clone(), format));
        tracing::subscriber::with_default(subscriber(&log, writer), act);
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_has_the_spans_of_its_call() {
        let act = || {
            let _call = tracing::info_span!("call", method = "has_vm", request_id = Some("cpi-1"))
                .entered();
            tracing::info!(elapsed_ms = 3, "done");
            tracing::debug!("unseen");
        };
        let line = written(LogLevel::Info, LogFormat::Text, act);
        assert!(
            line.ends_with(
                "INFO call{method=\"has_vm\" request_id=\"cpi-1\"}: done elapsed_ms=3\n"
            ),
            "{line}"
        );
        let line = written(LogLevel::Info, LogFormat::Json, act);
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["message"], &line["span"]["method"]), (&"done".into(), &"has_vm".into()));
        assert_eq!(line["span"]["request_id"], "cpi-1");
    }

    #[test]
    fn events_of_dependencies_and_escapes_are_left_out() {
        let text = written(LogLevel::Trace, LogFormat::Text, || {
            tracing::error!(target: "netlink", "theirs");
            tracing::error!("ours \u{1b}[31m");
        });
        assert!(
            text.contains("ours") && !text.contains("theirs") && !text.contains('\u{1b}'),
            "{text:?}"
        );
    }

    #[test]
    fn a_line_has_no_control_character() {
        let hostile = "x\n\r\u{85}\u{9b}31m\u{202e}\u{2028}y";
        let act = || tracing::error!(value = %hostile, "network '{hostile}'");
        for format in [LogFormat::Text, LogFormat::Json] {
            let text = written(LogLevel::Info, format, act);
            let line = text.strip_suffix('\n').unwrap();
            assert!(!line.contains(crate::schema::is_control), "{line:?}");
            if format == LogFormat::Json {
                let event: serde_json::Value = serde_json::from_str(line).unwrap();
                assert!(event["message"].as_str().unwrap().contains("\u{202e}"), "{line}");
            }
        }
    }

    #[test]
    fn a_full_log_ends_with_one_notice() {
        for (format, last) in [
            (LogFormat::Text, "\nfurther log lines dropped\n"),
            (LogFormat::Json, "\n{\"level\":\"WARN\",\"message\":\"further log lines dropped\"}\n"),
        ] {
            let text = written(LogLevel::Info, format, || {
                for _ in 0..1000 {
                    tracing::info!("{}", "x".repeat(200));
                }
            });
            assert!(
                text.len() > MAX_BYTES - 1000 && text.len() < MAX_BYTES + 100,
                "{}",
                text.len()
            );
            assert!(text.ends_with(last), "{}", &text[text.len() - 200..]);
            assert_eq!(text.matches("dropped").count(), 1);
        }
    }

    #[test]
    fn a_closed_stderr_is_ignored() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut bounded = Bounded::new(Closed, LogFormat::Text);
        assert!(bounded.write_all(b"line\n").and_then(|()| bounded.flush()).is_ok());
    }
}
