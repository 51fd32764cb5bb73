//! A guest of a few instructions: an ELF file with a PVH note, made here.

use std::fs::File;
use std::io::Write;

/// Where the instructions are loaded and entered.
const ENTRY: u32 = 0x10_0000;

/// 32 bit code, built instruction by instruction.
#[derive(Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out(mut self, port: u16, value: u8) -> Self {
        self.0.extend([0x66, 0xba]);
        self.0.extend(port.to_le_bytes());
        self.0.extend([0xb0, value, 0xee]);
        self
    }

    /// Each byte to the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// The text with one string instruction, `rep outsb`. First of all instructions: it knows where it is.
    pub(crate) fn print_string(mut self, text: &str) -> Self {
        assert!(self.0.is_empty());
        let length = u8::try_from(text.len()).unwrap();
        // A short jump over the text.
        self.0.extend([0xeb, length]);
        self.0.extend(text.bytes());
        self.0.extend([0x66, 0xba, 0xf8, 0x03, 0xbe]);
        self.0.extend((ENTRY + 2).to_le_bytes());
        self.0.push(0xb9);
        self.0.extend(u32::from(length).to_le_bytes());
        self.0.extend([0xf3, 0x6e]);
        self
    }

    /// Spins for ever.
    pub(crate) fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Any instruction.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// The kernel file.
    pub(crate) fn into_kernel(self) -> File {
        const HEADERS: usize = 64 + 2 * 56;
        const NOTE: usize = 12 + 4 + 4;
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        elf.resize(16, 0);
        // Executable, x86-64, version 1; entry; program headers follow; the rest is sizes and counts.
        elf.extend(2_u16.to_le_bytes());
        elf.extend(62_u16.to_le_bytes());
        elf.extend(1_u32.to_le_bytes());
        elf.extend(u64::from(ENTRY).to_le_bytes());
        elf.extend(64_u64.to_le_bytes());
        elf.extend(0_u64.to_le_bytes());
        elf.extend(0_u32.to_le_bytes());
        for field in [64_u16, 56, 2, 0, 0, 0] {
            elf.extend(field.to_le_bytes());
        }
        program_header(&mut elf, 1, HEADERS + NOTE, ENTRY, self.0.len());
        program_header(&mut elf, 4, HEADERS, 0, NOTE);
        // XEN_ELFNOTE_PHYS32_ENTRY
        for word in [4_u32, 4, 18] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(b"Xen\0");
        elf.extend(ENTRY.to_le_bytes());
        elf.extend(&self.0);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}

fn program_header(elf: &mut Vec<u8>, kind: u32, offset: usize, address: u32, length: usize) {
    elf.extend(kind.to_le_bytes());
    elf.extend(7_u32.to_le_bytes());
    elf.extend((offset as u64).to_le_bytes());
    elf.extend(u64::from(address).to_le_bytes());
    elf.extend(u64::from(address).to_le_bytes());
    elf.extend((length as u64).to_le_bytes());
    elf.extend((length as u64).to_le_bytes());
    elf.extend(4_u64.to_le_bytes());
}
