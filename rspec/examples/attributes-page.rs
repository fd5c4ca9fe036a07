//! Prints `docs/rspec.md`, which is written from the attribute table.

fn main() {
    print!("{}", mandoline_rspec::attributes_page());
}
