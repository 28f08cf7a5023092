use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc;

use qapi::qmp::query_version;
use serde_json::json;

use super::*;
use crate::error::{Error, ErrorKind};
use crate::qmp::testing::{ScriptedMonitor, test_deadline};
use crate::qmp::{EventKind, Monitor};

const SHORT_TIMEOUT: Duration = Duration::from_millis(50);

fn connect(server: &ScriptedMonitor) -> Monitor {
    Monitor::connect(&server.socket(), test_deadline()).unwrap()
}

#[test]
fn events_may_come_anywhere_and_be_unknown() {
    let server = ScriptedMonitor::new(|peer| {
        peer.send(r#"{"event": "EARLY", "timestamp": {"seconds": 1, "microseconds": 0}}"#);
        peer.send(r#"{"QMP": {}}"#);
        let id = peer.expect("qmp_capabilities");
        peer.send(&format!(r#"{{"return": {{}}, "id": {id}}}"#));
        let id = peer.expect("query-status");
        peer.send(r#"{"event": "NETDEV_VHOST_USER_CONNECTED", "data": {"new": [1]}}"#);
        peer.send(r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#);
        peer.send(&format!(
            r#"{{"return": {{"running": false, "status": "brand-new"}}, "id": {id}}}"#
        ));
    });
    let mut monitor = connect(&server);
    let status = monitor.execute(&crate::qmp::query::QueryStatus {}).unwrap();
    assert_eq!(status.state, "brand-new");
    let event = monitor.wait_event(|e| e.name == "SHUTDOWN", test_deadline()).unwrap().unwrap();
    assert_eq!(event.kind(), EventKind::Shutdown { guest: true, reason: "guest-shutdown" });
    assert!(matches!(monitor.wait_event(|_| true, test_deadline()), Err(MonitorError::Closed)));
}

#[test]
fn reply_to_another_command_is_dropped() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("x");
        peer.send(r#"{"return": "late", "id": 4711}"#);
        peer.send(r#"{"error": {"class": "GenericError", "desc": "late"}, "id": 4712}"#);
        peer.send(&format!(r#"{{"return": "own", "id": {id}}}"#));
    });
    assert_eq!(connect(&server).raw("x", &json!({})).unwrap(), "own");
}

#[test]
fn refused_command_leaves_the_connection_usable() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("device_del");
        peer.send(&format!(
            r#"{{"error": {{"class": "DeviceNotFound", "desc": "no\n\u001b[31m"}}, "id": {id}}}"#
        ));
        let id = peer.expect("query-version");
        peer.send(&format!(r#"{{"return": [], "id": {id}}}"#));
        let id = peer.expect("x");
        peer.send(&format!(r#"{{"return": null, "id": {id}}}"#));
    });
    let mut monitor = connect(&server);
    let error = monitor.execute(&qapi::qmp::device_del { id: "d".into() }).unwrap_err();
    assert!(error.is_device_not_found());
    assert_eq!(
        Error::from(error).report(),
        "qemu refused 'device_del': no\\n\\u{1b}[31m (DeviceNotFound)"
    );
    assert!(matches!(monitor.execute(&query_version {}), Err(MonitorError::InvalidReply { .. })));
    assert_eq!(monitor.raw("x", &json!({})).unwrap(), Value::Null);
}

#[test]
fn command_without_reply_times_out_and_poisons_the_connection() {
    let (late, timed_out) = mpsc::channel();
    let server = ScriptedMonitor::negotiated(move |peer| {
        let id = peer.expect("x");
        timed_out.recv().unwrap();
        peer.send(&format!(r#"{{"return": "too late", "id": {id}}}"#));
        peer.wait_for_close();
    });
    let mut monitor = connect(&server);
    monitor.run(async |c| c.set_deadline(Instant::now() + SHORT_TIMEOUT));
    let error = monitor.raw("x", &json!({})).unwrap_err();
    assert!(matches!(&error, MonitorError::Timeout { command, .. } if command == "x"), "{error}");
    assert_eq!(Error::from(error).kind(), ErrorKind::Timeout);
    late.send(()).unwrap();
    assert!(matches!(monitor.raw("y", &json!({})), Err(MonitorError::Poisoned)));
    assert!(matches!(monitor.wait_event(|_| true, test_deadline()), Err(MonitorError::Poisoned)));
}

#[test]
fn command_after_the_deadline_is_not_sent() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("in-time");
        peer.send(&format!(r#"{{"return": {{}}, "id": {id}}}"#));
    });
    let mut monitor = connect(&server);
    monitor.run(async |c| c.set_deadline(Instant::now()));
    assert!(matches!(
        monitor.raw("too-late", &json!({})),
        Err(MonitorError::DeadlinePassed { .. })
    ));
    monitor.run(async |c| c.set_deadline(test_deadline()));
    monitor.raw("in-time", &json!({})).unwrap();
}

#[test]
fn dropped_exchange_poisons_the_connection_and_a_dropped_wait_does_not() {
    let server = ScriptedMonitor::negotiated(|peer| {
        peer.send_bytes(br#"{"event": "HA"#);
        peer.expect("go-on");
        peer.send_bytes(b"LF\"}\n");
        peer.wait_for_close();
    });
    let mut monitor = connect(&server);
    assert_eq!(monitor.wait_event(|_| true, Instant::now() + SHORT_TIMEOUT).unwrap(), None);
    monitor.run(async |c| {
        let mut dropped = c.last_id;
        let _ = tokio::time::timeout(SHORT_TIMEOUT, c.raw("go-on", &json!({}))).await;
        dropped += 1;
        assert_eq!((c.last_id, c.poisoned), (dropped, true));
        assert_eq!(c.events.pop().unwrap().name, "HALF");
    });
}

#[test]
fn invalid_qmp_is_a_protocol_error() {
    for garbage in ["HTTP/1.1 400 Bad Request", "{}", "{\"return\": {}}", "{\"QMP\": {}}", "\u{0}"]
    {
        let server = ScriptedMonitor::negotiated(move |peer| {
            peer.expect("x");
            peer.send(garbage);
        });
        let mut monitor = connect(&server);
        assert!(
            matches!(monitor.raw("x", &json!({})), Err(MonitorError::Protocol(_))),
            "{garbage}"
        );
        assert!(matches!(monitor.raw("y", &json!({})), Err(MonitorError::Poisoned)));
    }
}

#[test]
fn close_within_a_reply_is_closed() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("x");
        peer.send_bytes(format!(r#"{{"return": {{}}, "id": {id}}}"#).as_bytes());
    });
    assert!(matches!(connect(&server).raw("x", &json!({})), Err(MonitorError::Closed)));
}

#[test]
fn huge_line_is_refused_before_it_fills_the_memory() {
    let server = ScriptedMonitor::negotiated(|peer| {
        peer.expect("x");
        peer.send_bytes(br#"{"return": ""#);
        for _ in 0..64 {
            peer.send_bytes(&[b'a'; 64 << 10]);
        }
    });
    let mut monitor = connect(&server);
    assert!(matches!(monitor.raw("x", &json!({})), Err(MonitorError::Protocol(_))));
    let capacity = monitor.run(async |c| c.received.capacity());
    assert!(capacity <= 4 * LONGEST_LINE, "{capacity}");
}

#[test]
fn long_reply_is_read() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("x");
        peer.send(&format!(r#"{{"return": "{}", "id": {id}}}"#, "a".repeat(1 << 20)));
    });
    assert_eq!(
        connect(&server).raw("x", &json!({})).unwrap().as_str().map(str::len),
        Some(1 << 20)
    );
}

#[test]
fn queue_of_many_events_keeps_the_latest() {
    let server = ScriptedMonitor::negotiated(|peer| {
        let id = peer.expect("x");
        for n in 0..1000 {
            peer.send(&format!(r#"{{"event": "E{n}"}}"#));
        }
        peer.send(&format!(r#"{{"return": {{}}, "id": {id}}}"#));
    });
    let mut monitor = connect(&server);
    monitor.raw("x", &json!({})).unwrap();
    let first = monitor.wait_event(|_| true, test_deadline()).unwrap().unwrap();
    assert_eq!(first.name, format!("E{}", 1000 - EventQueue::LONGEST));
    assert!(monitor.wait_event(|e| e.name == "E999", test_deadline()).unwrap().is_some());
}

#[test]
fn missing_greeting_hints_at_another_client() {
    let server = ScriptedMonitor::new(crate::qmp::testing::Peer::wait_for_close);
    let error = Monitor::connect(&server.socket(), Instant::now() + SHORT_TIMEOUT).unwrap_err();
    assert!(matches!(error, MonitorError::Greeting { .. }));
    let error = Error::from(error);
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.report().contains("another client may hold the monitor"), "{}", error.report());
}

#[test]
fn full_backlog_is_a_greeting_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut waiting = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // The kernel refuses the connection after the last one that fits the backlog.
    while let Ok(stream) = runtime.block_on(UnixStream::connect(&path)) {
        waiting.push(stream);
    }
    let error = Monitor::connect(&path, Instant::now() + SHORT_TIMEOUT).unwrap_err();
    assert!(matches!(error, MonitorError::Greeting { .. }), "{error}");
}

#[test]
fn connect_without_a_listener_fails() {
    let error = Monitor::connect(Path::new("/nowhere/qmp.sock"), test_deadline()).unwrap_err();
    assert!(matches!(error, MonitorError::Connect { .. }));
    let report = Error::from(error).report();
    assert!(
        report.starts_with("connect to monitor '/nowhere/qmp.sock': No such file or directory"),
        "{report}"
    );
}
