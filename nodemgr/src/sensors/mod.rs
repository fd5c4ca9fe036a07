//! Sensors, as PlanetLab's OS paper has them (section 4.4.1): `http://localhost:33080/<sensor>/<arguments>`, GET
//! and HEAD, lines of comma separated values; on the node's loopback and, over vsock, inside every sliver.
//!
//! ```text
//!  /nodes/ip/name      a table, at once                                    snapshot
//!  /load?every=5       the same again every 5 seconds, until the reader closes   streaming
//!  /metrics            what programs of today read                         Prometheus' text form
//! ```
//!
//! All that sensors tell is open to every sliver of the node, as it was on PlanetLab. Since browsers can be led to
//! ports of their own machine, requests with a foreign `Host` or with an `Origin` are refused.

mod metrics;
mod published;
mod table;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::IntervalStream;

pub(crate) use self::metrics::{CONTENT_TYPE as METRICS_TYPE, text as metrics};
pub use self::published::{PublishError, Published, TABLE_MAX};
use self::table::{SENSORS, SensorError};
use crate::services::Streams;
use crate::usage::Meter;

/// Longest time between two snapshots of a stream, in seconds.
const EVERY_MAX: u64 = 3600;

/// Serves the sensors on a port of the node.
pub async fn serve(meter: Arc<Meter>, listener: TcpListener) -> std::io::Result<()> {
    axum::serve(listener, router(meter)).await
}

/// Serves the sensors to slivers.
pub async fn serve_slivers(meter: Arc<Meter>, streams: Streams) -> std::io::Result<()> {
    axum::serve(streams, router(meter)).await
}

fn router(meter: Arc<Meter>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/metrics", get(all_metrics))
        .fallback(get(sensor))
        .layer(from_fn(local_only))
        .with_state(meter)
}

/// Refuses what a browser was led to send.
async fn local_only(request: Request, next: Next) -> Response {
    match foreign(request.headers()) {
        Some(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
        None => next.run(request).await,
    }
}

fn foreign(headers: &HeaderMap) -> Option<String> {
    if headers.contains_key(header::ORIGIN) {
        return Some("sensors are not for web pages: allowed are requests without Origin".to_owned());
    }
    let host = headers.get(header::HOST)?;
    let name = host.to_str().unwrap_or("");
    let name = match name.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => name,
    };
    match ["localhost", "127.0.0.1", "[::1]"].contains(&name) {
        true => None,
        false => Some(format!("Host is {host:?}; allowed: localhost, 127.0.0.1, [::1]")),
    }
}

const CSV: &str = "text/csv; charset=utf-8";

async fn index(State(meter): State<Arc<Meter>>) -> Response {
    let mut text = String::new();
    for sensor in SENSORS {
        text.push_str(&table::line(&[sensor.name, sensor.columns, sensor.help]));
    }
    for (name, columns) in meter.published.names() {
        text.push_str(&table::line(&[
            &name,
            &columns.join(" "),
            "published by a service of this node",
        ]));
    }
    ([(header::CONTENT_TYPE, CSV)], text).into_response()
}

async fn all_metrics(State(meter): State<Arc<Meter>>) -> Response {
    ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics(&meter).await).into_response()
}

#[derive(Deserialize)]
struct Stream {
    every: Option<u64>,
}

async fn sensor(State(meter): State<Arc<Meter>>, Query(query): Query<Stream>, request: Request) -> Response {
    let path = request.uri().path().trim_matches('/').to_owned();
    let first = match table::read(&meter, &path).await {
        Ok(text) => text,
        Err(error) => return refuse(&error),
    };
    let body = match query.every {
        None => Body::from(first),
        Some(seconds) if (1..=EVERY_MAX).contains(&seconds) => stream_of(meter, path, first, seconds),
        Some(seconds) => {
            let text = format!("every={seconds} is refused; allowed: 1 to {EVERY_MAX} seconds\n");
            return (StatusCode::BAD_REQUEST, text).into_response();
        }
    };
    ([(header::CONTENT_TYPE, CSV)], body).into_response()
}

fn refuse(error: &SensorError) -> Response {
    let status = match error {
        SensorError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::NOT_FOUND,
    };
    (status, format!("{error}\n")).into_response()
}

/// The same again, until the reader closes or the sensor has nothing more to say.
fn stream_of(meter: Arc<Meter>, path: String, first: String, seconds: u64) -> Body {
    let period = Duration::from_secs(seconds);
    let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    // A slow reader gets fewer lines, not late ones.
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let later = IntervalStream::new(interval).then(move |_| {
        let (meter, path) = (Arc::clone(&meter), path.clone());
        async move { table::read(&meter, &path).await }
    });
    let later = later
        .take_while(|read| std::future::ready(read.is_ok()))
        .filter_map(|read| std::future::ready(read.ok()));
    let lines = stream::iter([first]).chain(later).map(Ok::<_, Infallible>);
    Body::from_stream(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_pages_are_kept_out() {
        let headers = |list: &[(&str, &str)]| -> HeaderMap {
            list.iter()
                .map(|(name, value)| {
                    (
                        name.parse::<header::HeaderName>().unwrap(),
                        value.parse().unwrap(),
                    )
                })
                .collect()
        };
        for good in [
            "localhost",
            "localhost:33080",
            "127.0.0.1:33080",
            "[::1]:80",
            "[::1]",
        ] {
            assert_eq!(foreign(&headers(&[("host", good)])), None, "{good}");
        }
        assert_eq!(foreign(&HeaderMap::new()), None);
        for bad in ["evil.example.org", "localhost.evil.org:33080", "10.0.0.1", ""] {
            assert!(foreign(&headers(&[("host", bad)])).is_some(), "{bad}");
        }
        assert!(foreign(&headers(&[("host", "localhost"), ("origin", "http://x")])).is_some());
    }
}
