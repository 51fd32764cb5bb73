//! Fuzz target of the parser of snapshots.

use super::{HEADER_BYTES, MAGIC, MachineState, SnapshotError, VERSION};

/// The file of a snapshot, when the first byte is even, or a body that gets the header it needs.
///
/// # Panics
/// When a state that was read does not survive being written and read again.
pub fn machine_state(data: &[u8]) {
    let Some(Ok(state)) = read(data) else {
        return;
    };
    // Not what was read: KVM's structures may end early in a file, and are completed with zeroes.
    let written = bytes_of(&state);
    let again = MachineState::read(&written[..]).expect("it was just written");
    assert_eq!(bytes_of(&again), written);
    state
        .check_processor(&again.cpuid)
        .expect("a processor fits itself");
}

fn read(data: &[u8]) -> Option<Result<MachineState, SnapshotError>> {
    let (kind, rest) = data.split_first()?;
    let file = if kind & 1 == 0 { rest.to_vec() } else { whole(rest) };
    Some(MachineState::read(&file[..]))
}

/// No checksum is found by chance.
fn whole(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("inputs are small");
    let mut file = Vec::with_capacity(HEADER_BYTES + body.len());
    file.extend(MAGIC);
    for word in [VERSION, length, crc32fast::hash(body)] {
        file.extend(word.to_le_bytes());
    }
    file.extend(body);
    file
}

fn bytes_of(state: &MachineState) -> Vec<u8> {
    let mut bytes = Vec::new();
    state
        .write(&mut bytes)
        .expect("what was read is not too long to be written");
    bytes
}

#[cfg(test)]
mod tests {
    use super::{MachineState, SnapshotError, read};

    fn seed(name: &str) -> Result<MachineState, SnapshotError> {
        let path = format!(
            "{}/../fuzz/seeds/machine_state/{name}",
            env!("CARGO_MANIFEST_DIR")
        );
        read(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn seeds_reach_every_part_of_a_state() {
        let state =
            seed("two-vcpus").expect("when the layout of a state changes, its seeds are to be made anew");
        assert_eq!((state.n_possible_vcpus, state.memory_mib), (2, 128));
        assert_eq!((state.data.len(), state.cpuid.len()), (2, 3));
        assert_eq!((state.vcpus.len(), state.devices.len()), (2, 3));
    }

    #[test]
    fn more_than_any_machine_has_is_refused() {
        for name in ["too-many-vcpus", "too-many-leaves"] {
            assert!(matches!(seed(name), Err(SnapshotError::Encoding(_))), "{name}");
        }
    }
}
