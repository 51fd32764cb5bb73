//! Generates Rust from the `.proto` files with the pure Rust compiler (no `protoc` is needed).

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    println!("cargo:rerun-if-changed=protos");
    Codegen::new()
        .inputs(["protos/guest.proto", "protos/sandbox.proto"])
        .include("protos")
        .out_dir(&out_dir)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("the .proto files of this crate compile");
    // The generated files begin with inner attributes, which `include!` does not take: drop them.
    for entry in fs::read_dir(&out_dir).expect("OUT_DIR is readable") {
        let path = entry.expect("OUT_DIR is readable").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("generated code is UTF-8");
            let text: String = text
                .lines()
                .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
                .flat_map(|line| [line, "\n"])
                .collect();
            fs::write(&path, text).expect("OUT_DIR is writable");
        }
    }
}
