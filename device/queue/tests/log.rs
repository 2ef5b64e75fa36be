//! What the log says of refused chains, and that a guest cannot flood it.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

mod driver;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use driver::{BUFFERS, Driver, WRITE, memory};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use viommu_queue::RequestQueue;

/// Keeps the fields of each warning as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0.trim_end().to_owned());
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn refused_chains_are_named_and_counted() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 16);
    let mut queue = RequestQueue::new(16, 600).unwrap();
    driver.enable(queue.queue_mut(), false);
    driver.chain(3, &[(BUFFERS, 4, WRITE), (BUFFERS, 4, 0)]);
    driver.chain(5, &[(0x10, 4, WRITE)]);
    for head in [3, 5, 99] {
        driver.offer(head);
    }
    let log = Log::default();
    let kick = tracing::subscriber::with_default(log.clone(), || queue.kick(&memory, |_, _| 0).unwrap());
    assert_eq!(kick.refused, 3);
    assert_eq!(
        *log.0.lock().unwrap(),
        [
            r#"message=chain refused queue="request" head=3 error=readable descriptor after a writable one"#,
            r#"message=chain refused queue="request" head=5 error=buffer at 0x10, 4 bytes, is not in guest memory"#,
            r#"message=chain refused queue="request" head=99 error=head 99 is not in the descriptor table"#,
        ]
    );

    for _ in 0..16 {
        driver.offer(99);
    }
    let log = Log::default();
    let kick = tracing::subscriber::with_default(log.clone(), || queue.kick(&memory, |_, _| 0).unwrap());
    assert_eq!(kick.refused, 16);
    let lines = log.0.lock().unwrap();
    assert_eq!(lines.len(), 9, "{lines:?}");
    assert_eq!(lines.last().unwrap(), r#"message=further chains refused queue="request" more=8"#);
}
