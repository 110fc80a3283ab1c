//! A VM assembled: boot protocols, firmware tables, the board, vCPU threads, snapshots.
//!
//! Way of the data: [`VmConfig`] → [`Vm::new`]: `boot::load` fills memory, [`machine`] builds the board, `vcpu` gives
//! the vCPUs their registers → [`Vm::run`]: `vcpu` threads run the engine, which reaches devices through [`io`] and comes
//! back with exits; `control` collects what concerns the machine as a whole; [`vm`] acts on it → [`Outcome`].
//! Other threads hold a [`VmHandle`].

mod account;
pub mod boot;
mod clock;
pub mod config;
mod control;
mod debug;
mod error;
pub mod firmware;
pub mod gdb;
mod handle;
mod input;
mod io;
mod machine;
mod profile;
mod report;
mod sink;
pub mod snapshot;
mod stats;
mod trace;
mod vcpu;
mod vm;

pub use clock::host_tsc_hz;
pub use config::{
    CardModel, ClockMode, DiskBus, DiskConfig, EngineKind, NetConfig, RtcBase, Sink, TraceWhat, VmConfig,
    VsockConfig,
};
pub use control::SAVE_MARKER;
pub use devices::ahci::MAX_DRIVES as MAX_AHCI_DRIVES;
pub use devices::chipset::i8042::Key;
pub use devices::chipset::text_screen::{TextScreen, render_ansi};
pub use devices::net::{CardOptions, Doorbell, Mac};
pub use devices::virtio::balloon::{BalloonOptions, BalloonReport};
pub use devices::virtio::block::{
    Image, ImageError, ImageFormat, ImageOptions, MAX_QUEUES as MAX_DISK_QUEUES,
};
pub use devices::virtio::share::{MAX_TAG as MAX_SHARE_TAG, ShareOptions, ShareProtocol};
pub use devices::virtio::vsock::{Endpoint, FIRST_CID, LAST_CID};
pub use engine_bt::trace::{AddressRange, Levels};
pub use error::VmError;
pub use handle::{Paused, VmHandle};
pub use input::Typed;
pub use snapshot::{Snapshot, SnapshotError};
pub use stats::{Stats, VcpuStats};
pub use vm::{Outcome, Vm};
