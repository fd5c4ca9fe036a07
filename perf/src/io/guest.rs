//! The loads, inside the guest. The program comes in on a disk of its own, behind which lie the blocks to read.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum GuestWork {
    /// Reads random blocks past the page cache; prints reads a second.
    Blk {
        #[arg(long)]
        device: String,
        /// Where blocks may be read, in bytes.
        #[arg(long)]
        from: u64,
        #[arg(long)]
        to: u64,
        #[arg(long)]
        threads: u32,
        #[arg(long)]
        ms: u64,
    },
    /// Connects and sends for so long.
    TcpSend {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        ms: u64,
    },
    /// Connects and reads to the end; prints bytes a second.
    TcpReceive {
        #[arg(long)]
        from: SocketAddr,
    },
    /// Sends 64-byte packets for so long.
    UdpSend {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        ms: u64,
    },
}

const BLOCK: u64 = 4096;

/// A buffer as `O_DIRECT` wants it.
#[repr(align(4096))]
struct Block([u8; BLOCK as usize]);

pub(crate) fn run(work: &GuestWork) -> Result<()> {
    match work {
        GuestWork::Blk {
            device,
            from,
            to,
            threads,
            ms,
        } => {
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(device)
                .with_context(|| device.clone())?;
            let (file, blocks) = (&file, (to - from) / BLOCK);
            let began = Instant::now();
            let until = began + Duration::from_millis(*ms);
            let reads: u64 = std::thread::scope(|scope| {
                let workers: Vec<_> = (0..*threads)
                    .map(|seed| scope.spawn(move || read_blocks(file, *from, blocks, u64::from(seed), until)))
                    .collect();
                workers
                    .into_iter()
                    .map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?)
                    .sum::<Result<u64>>()
            })?;
            println!("{}", reads as f64 / began.elapsed().as_secs_f64());
        }
        GuestWork::TcpSend { to, ms } => {
            let mut stream = TcpStream::connect(to)?;
            let (began, buffer) = (Instant::now(), vec![7; 128 << 10]);
            while began.elapsed() < Duration::from_millis(*ms) {
                stream.write_all(&buffer)?;
            }
        }
        GuestWork::TcpReceive { from } => {
            let mut stream = TcpStream::connect(from)?;
            let (began, mut buffer, mut bytes) = (Instant::now(), vec![0; 128 << 10], 0);
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    count => bytes += count,
                }
            }
            println!("{}", bytes as f64 / began.elapsed().as_secs_f64());
        }
        GuestWork::UdpSend { to, ms } => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(*ms) {
                // A full queue is no failure of the load: the packet is lost, as on any network.
                for _ in 0..16 {
                    let _ = socket.send(&[7; 64]);
                }
            }
        }
    }
    Ok(())
}

fn read_blocks(file: &File, from: u64, blocks: u64, seed: u64, until: Instant) -> Result<u64> {
    let mut block = Box::new(Block([0; BLOCK as usize]));
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut reads = 0;
    while Instant::now() < until {
        // xorshift: which blocks does not matter, only that they jump.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        file.read_exact_at(&mut block.0, from + random % blocks * BLOCK)?;
        reads += 1;
    }
    Ok(reads)
}
