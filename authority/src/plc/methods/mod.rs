//! The methods that work, by object. What is not here is fault 100.

mod get;
mod nodes;
mod people;
mod session;
mod slices;

use std::sync::LazyLock;

use super::method::Method;
use super::system;

/// Every method, by name.
pub static METHODS: LazyLock<Vec<&'static Method>> = LazyLock::new(|| {
    let tables = [
        system::METHODS,
        session::METHODS,
        people::METHODS,
        nodes::METHODS,
        slices::METHODS,
        get::METHODS,
    ];
    let mut all: Vec<&'static Method> = tables.into_iter().flatten().collect();
    all.sort_by_key(|method| method.name);
    all
});

/// The method of this name.
pub(super) fn find(name: &str) -> Option<&'static Method> {
    METHODS
        .binary_search_by_key(&name, |method| method.name)
        .ok()
        .map(|index| METHODS[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_there_once_and_found() {
        for pair in METHODS.windows(2) {
            assert!(pair[0].name < pair[1].name, "{}", pair[1].name);
        }
        assert!(find("GetSlivers").is_some() && find("NoSuch").is_none());
        for method in METHODS.iter() {
            assert!(!method.help.is_empty(), "{}", method.name);
            let first_optional = method
                .args
                .iter()
                .position(|arg| arg.optional)
                .unwrap_or(method.args.len());
            assert!(
                method.args[first_optional..].iter().all(|arg| arg.optional),
                "{}",
                method.name
            );
        }
    }
}
