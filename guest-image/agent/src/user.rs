//! Users of the sliver, from `/etc/passwd` and `/etc/group` (a static program has no name service switch).

use std::fs;

use crate::error::{Context as _, Error};

/// A user as a program runs under it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

impl User {
    /// Root, of whom every image knows.
    pub(crate) fn root() -> User {
        User {
            name: "root".into(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: "/root".into(),
            shell: "/bin/sh".into(),
        }
    }

    /// The user of that name.
    pub(crate) fn find(name: &str) -> Result<User, Error> {
        let passwd = fs::read_to_string("/etc/passwd").context(|| "reading /etc/passwd".to_owned())?;
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        parse(name, &passwd, &group)
            .ok_or_else(|| Error::NotFound(format!("no user `{name}` in /etc/passwd")))
    }
}

fn parse(name: &str, passwd: &str, group: &str) -> Option<User> {
    let fields: Vec<&str> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|f| f.first() == Some(&name))?;
    let gid = fields.get(3)?.parse().ok()?;
    let mut groups = vec![gid];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if fields
            .get(3)
            .is_some_and(|members| members.split(',').any(|member| member == name))
        {
            groups.extend(
                fields
                    .get(2)
                    .and_then(|gid| gid.parse::<u32>().ok())
                    .filter(|g| *g != gid),
            );
        }
    }
    Some(User {
        name: name.to_owned(),
        uid: fields.get(2)?.parse().ok()?,
        gid,
        groups,
        home: fields
            .get(5)
            .filter(|home| !home.is_empty())
            .map_or("/", |home| *home)
            .to_owned(),
        shell: fields
            .get(6)
            .filter(|shell| !shell.is_empty())
            .map_or("/bin/sh", |shell| *shell)
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_with_their_groups() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1000::/home/ann:\n";
        let group = "root:x:0:\nadm:x:4:bob,ann\nann:x:1000:ann\nbroken:ann\n";
        let ann = parse("ann", passwd, group).expect("is there");
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 1000, vec![1000, 4]));
        assert_eq!((ann.home.as_str(), ann.shell.as_str()), ("/home/ann", "/bin/sh"));
        assert_eq!(parse("bob", passwd, group), None);
        assert_eq!(parse("broken", passwd, group), None);
    }
}
