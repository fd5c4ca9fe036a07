//! The demo's authority, and what is in it.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mandoline_api::authority::{NewKey, NewNode, NewPerson, NewSession, NewSite, NodeAdded};
use mandoline_api::authority_client::{AuthorityClient, Caller, ClientError};

use super::children::{Daemon, tail};
use super::{HOSTNAME, PERSON, SITE};
use crate::config::write_private;
use crate::error::{About, Error, Result};

const ADMIN: &str = "admin@demo.example";
/// How often the authority is asked whether it is there yet.
const ASK: Duration = Duration::from_millis(20);
/// How long it may take to come up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often another port is tried when somebody was quicker.
const PORTS: usize = 3;

/// A running authority.
pub(super) struct Authority {
    daemon: Daemon,
    /// Its address.
    pub(super) url: String,
    /// Its port on loopback.
    pub(super) port: u16,
    admin: AuthorityClient,
}

/// Who is there, and what they have.
pub(super) struct People {
    /// The authority, called by its administrator.
    pub(super) admin: AuthorityClient,
    /// The authority, called by the person whose slice it will be.
    pub(super) user: AuthorityClient,
    /// The person's session.
    pub(super) user_token: String,
    /// The person's private key.
    pub(super) key: PathBuf,
    /// The node.
    pub(super) added: NodeAdded,
}

impl Authority {
    /// Makes one below `dir` and starts it on a free port.
    pub(super) async fn start(bin: &Path, dir: &Path) -> Result<Self> {
        let program = bin.join("mandoline-authority");
        let data = dir.join("authority");
        let password = random_password()?;
        let password_file = dir.join("admin-password");
        write_private(&password_file, password.as_bytes()).about(password_file.display())?;
        let init = tokio::process::Command::new(&program)
            .args(["init", "--admin-email", ADMIN, "--admin-password-file"])
            .arg(&password_file)
            .arg("--data")
            .arg(&data)
            .kill_on_drop(true)
            .output()
            .await
            .about(program.display())?;
        if !init.status.success() {
            let log = String::from_utf8_lossy(&init.stderr);
            return Err(Error::failure(format!(
                "mandoline-authority init: {}\n{}",
                init.status,
                tail(&log)
            )));
        }
        let mut attempt = 1;
        loop {
            let port = free_port()?;
            let mut command = Command::new(&program);
            command
                .arg("serve")
                .arg("--data")
                .arg(&data)
                .args(["--listen", &format!("127.0.0.1:{port}")]);
            let mut daemon =
                Daemon::start("mandoline-authority", command, &dir.join("authority.log"), false)?;
            let url = format!("http://127.0.0.1:{port}");
            let session = NewSession {
                email: ADMIN.into(),
                password: password.clone(),
            };
            match sign_in(&url, &session, &mut daemon).await {
                Ok((admin, _)) => {
                    return Ok(Self {
                        daemon,
                        url,
                        port,
                        admin,
                    });
                }
                // Between asking for a free port and listening on it somebody else may take it.
                Err(_) if attempt < PORTS && daemon.tail().contains("in use") => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// A site, a person with a key, a node.
    pub(super) async fn populate(&mut self, dir: &Path) -> Result<People> {
        let key = dir.join("id_ed25519");
        let made = tokio::process::Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", PERSON, "-f"])
            .arg(&key)
            .output()
            .await
            .map_err(|error| {
                Error::failure(format!("ssh-keygen: {error}")).advise("apt-get install openssh-client")
            })?;
        if !made.status.success() {
            return Err(Error::failure(format!(
                "ssh-keygen: {}",
                String::from_utf8_lossy(&made.stderr).trim()
            )));
        }
        let public = key.with_extension("pub");
        let public = std::fs::read_to_string(&public).about(public.display())?;

        let site = NewSite {
            name: "Demonstration".into(),
            login_base: SITE.into(),
            ..NewSite::default()
        };
        self.admin.add_site(&site).await?;
        let password = random_password()?;
        let person = NewPerson {
            email: PERSON.into(),
            first_name: "Alice".into(),
            last_name: "Demo".into(),
            password: Some(password.clone()),
            sites: vec![SITE.into()],
            // Limits are for PIs to set.
            roles: vec!["user".into(), "pi".into()],
            enabled: true,
        };
        self.admin.add_person(&person).await?;
        let session = NewSession {
            email: PERSON.into(),
            password,
        };
        let (user, user_token) = sign_in(&self.url, &session, &mut self.daemon).await?;
        user.add_key(&NewKey {
            key: public.trim().to_owned(),
            email: None,
        })
        .await?;
        let node = NewNode {
            hostname: HOSTNAME.into(),
            site: SITE.into(),
            boot_state: Some("boot".into()),
        };
        let added = self.admin.add_node(&node).await?;
        Ok(People {
            admin: self.admin.clone(),
            user,
            user_token,
            key,
            added,
        })
    }

    /// An error if it has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        self.daemon.check()
    }

    /// Ends when the authority does.
    pub(super) async fn until_it_ends(&mut self) -> Error {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Signs in, once the authority answers.
async fn sign_in(url: &str, session: &NewSession, daemon: &mut Daemon) -> Result<(AuthorityClient, String)> {
    let client = AuthorityClient::new(url, Caller::Anonymous)?;
    let asking = async {
        loop {
            match client.sign_in(session).await {
                Ok((session, client)) => return Ok((client, session.token)),
                Err(ClientError::Unavailable { .. }) => {
                    daemon.check()?;
                    tokio::time::sleep(ASK).await;
                }
                Err(error) => return Err(Error::from(error)),
            }
        }
    };
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(result) => result,
        Err(_) => Err(Error::failure(format!(
            "mandoline-authority does not answer at {url} after {} s; the end of its log:\n{}",
            PATIENCE.as_secs(),
            daemon.tail()
        ))),
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).about("a port of 127.0.0.1")?;
    Ok(listener.local_addr().about("a port of 127.0.0.1")?.port())
}

/// 128 bits as text: nobody has to remember it.
fn random_password() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).about("random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
