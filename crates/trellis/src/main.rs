//! placeholder
use trellis::image::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    if a.get(1).map(String::as_str) == Some("list") { print!("{}", list::table(&Cache::of_user().unwrap())); return; }
    let spec = ImageSpec::from_options(None, a.get(1).map(String::as_str)).unwrap();
    match fetch(&spec, &Sources::Host, &Progress::new()) { Ok(i) => println!("{:?}", i.directory), Err(e) => { eprintln!("trellis: error: {e}"); std::process::exit(1) } }
}
