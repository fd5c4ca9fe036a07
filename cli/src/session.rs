//! `login`, `logout`, `whoami`.

use std::io::{IsTerminal, Write};
use std::path::Path;

use mandoline_api::authority::NewSession;
use mandoline_api::authority_client::{AuthorityClient, Caller};

use crate::args::Login;
use crate::config::{self, Access, Config};
use crate::error::{About, Error, Exit, Result};
use crate::output::{Output, time};

pub(crate) async fn login(access: &Access, output: Output, args: &Login) -> Result<()> {
    let url = access.url()?;
    let email = match &args.email {
        Some(email) => email.clone(),
        None => ask_line("E-mail address")?,
    };
    let password = password(args.password_file.as_deref(), "Password", false)?;
    let anonymous = AuthorityClient::new(url, Caller::Anonymous)?;
    let (session, client) = anonymous
        .sign_in(&NewSession { email, password })
        .await
        .map_err(|error| {
            let error = Error::from(error);
            // "Log in" is no advice to somebody who does.
            if error.exit == Exit::Refused {
                Error::new(
                    Exit::Refused,
                    format!("{url} refuses: wrong e-mail address or password, or the account is not enabled"),
                )
            } else {
                error
            }
        })?;
    let person = client.whoami().await?;
    let path = config::path()?;
    Config {
        authority: Some(url.to_owned()),
        token: Some(session.token),
    }
    .write(&path)?;
    output.show(&person, |person| {
        format!(
            "logged in at {url} as {} until {} (session in {})",
            person.email,
            time(session.expires),
            path.display()
        )
    })
}

pub(crate) async fn logout(access: &Access, output: Output) -> Result<()> {
    let path = config::path()?;
    let mut config = Config::read(&path)?;
    if access.token.is_none() {
        return output.say("not logged in");
    }
    // What matters is that this machine forgets; a session that the authority no longer knows has ended too.
    let ended = match access.client() {
        Ok(client) => client.sign_out().await.map_err(Error::from),
        Err(error) => Err(error),
    };
    config.token = None;
    config.write(&path)?;
    match ended {
        Ok(()) => output.say("logged out"),
        Err(error) if error.exit == Exit::Refused => output.say("logged out; the session had ended before"),
        Err(error) => Err(error.during("the session is forgotten here, but may live on at the authority")),
    }
}

pub(crate) async fn whoami(access: &Access, output: Output) -> Result<()> {
    let person = access.client()?.whoami().await?;
    output.show(&person, |person| {
        format!(
            "{} ({} {})\nroles:  {}\nsites:  {}\nslices: {}",
            person.email,
            person.first_name,
            person.last_name,
            person.roles.join(", "),
            person.sites.join(", "),
            person.slices.join(", ")
        )
    })
}

fn ask_line(prompt: &str) -> Result<String> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage(format!(
            "{prompt} is missing and there is no terminal to ask on"
        )));
    }
    eprint!("{prompt}: ");
    let mut line = String::new();
    std::io::stderr()
        .flush()
        .and_then(|()| std::io::stdin().read_line(&mut line))
        .about("terminal")?;
    Ok(line.trim().to_owned())
}

/// A password: a file's first line, or asked for (twice, when it is a new one).
pub(crate) fn password(file: Option<&Path>, prompt: &str, new: bool) -> Result<String> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).about(path.display())?;
        let line = text.lines().next().unwrap_or_default();
        if line.is_empty() {
            return Err(Error::usage(format!(
                "{}: the first line is empty; a password should stand there",
                path.display()
            )));
        }
        return Ok(line.to_owned());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("there is no terminal to ask for the password on")
            .advise("give --password-file FILE"));
    }
    let asking = dialoguer::Password::new().with_prompt(prompt);
    let asking = if new {
        asking.with_confirmation("Again", "the two differ")
    } else {
        asking
    };
    asking.interact().about("terminal")
}
