//! Bytes as every record of the wire.

use viommu_wire::{Config, Event, Properties, Property, Request, Tail};

/// What can be read can be written, and reads the same again; what is behind a record changes nothing.
pub fn wire(bytes: &[u8]) {
    requests(bytes);
    events(bytes);
    let mut area = Properties::new(bytes);
    let mut found = 0;
    for property in area.by_ref() {
        found += 1;
        if let Ok(property) = property {
            properties(property);
        }
    }
    assert!(found <= bytes.len() / 4, "a property is at least a header");
    assert!(area.next().is_none());
    if let Some(config) = bytes.first_chunk().and_then(Config::decode) {
        assert_ne!(config.page_size_mask, 0);
        assert_eq!(Config::decode(&config.encode()), Some(config));
    }
    for tail in bytes.chunks(4).filter_map(Tail::decode) {
        assert_eq!(Tail::decode(&tail.encode()), Some(tail));
    }
}

fn requests(bytes: &[u8]) {
    let decoded = Request::decode(bytes);
    let longer = [bytes, &[0xff; 7]].concat();
    match decoded {
        Ok(request) => {
            let encoded = request.encode();
            assert_eq!(encoded.len(), request.kind().readable_len());
            assert_eq!(Request::decode(&encoded), Ok(request));
            assert_eq!(Request::decode(&longer), Ok(request));
            for cut in 0..encoded.len() {
                let error = Request::decode(&encoded[..cut]).expect_err("too short");
                assert_eq!(error.status().is_none(), cut < 4, "{cut}: {error}");
            }
        }
        Err(error) if bytes.len() >= Request::MAX_READABLE_LEN => {
            assert_eq!(Request::decode(&longer), Err(error));
        }
        Err(error) => {
            let _ = (error.status(), error.to_string());
        }
    }
}

fn events(bytes: &[u8]) {
    let Some(event) = Event::decode(bytes) else { return };
    let mut buffer = [0xee; 64];
    let length = event.encode(&mut buffer).expect("room");
    assert_eq!(Event::decode(&buffer[..length]), Some(event));
    assert!(buffer[length..].iter().all(|&byte| byte == 0xee));
    let mut short = vec![0xee; length - 1];
    assert_eq!(event.encode(&mut short), None);
    assert!(short.iter().all(|&byte| byte == 0xee), "an event that does not fit is not begun");
}

fn properties(property: Property) {
    let mut area = vec![0; property.encoded_len()];
    assert_eq!(property.encode(&mut area), Some(area.len()));
    assert_eq!(Properties::new(&area).collect::<Vec<_>>(), [Ok(property)]);
    let end = area.len() - 1;
    assert_eq!(property.encode(&mut area[..end]), None);
}
