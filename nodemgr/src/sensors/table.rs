//! The sensors themselves: each gives rows of values, all of one shape.

use std::pin::Pin;

use crate::caller::Caller;
use crate::usage::{Meter, memory};

/// Why a sensor gives nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SensorError {
    /// There is none of this name.
    #[error("no sensor {name:?}; allowed: {allowed}")]
    Unknown { name: String, allowed: String },
    /// It does not know what it is asked about.
    #[error("sensor {sensor}: {what}; allowed: {allowed}")]
    Argument {
        sensor: String,
        what: String,
        allowed: String,
    },
    /// The node manager failed.
    #[error("the node manager failed: {0}")]
    Internal(String),
}

type Rows = Result<Vec<Vec<String>>, SensorError>;
type Work<'a> = Pin<Box<dyn Future<Output = Rows> + Send + 'a>>;

/// A sensor of the node manager's own.
pub(super) struct Sensor {
    /// The first part of its address.
    pub(super) name: &'static str,
    /// Names of its values, in their order.
    pub(super) columns: &'static str,
    /// What it tells.
    pub(super) help: &'static str,
    /// What its address takes beside its name.
    argument: Option<&'static str>,
    read: for<'a> fn(&'a Meter, &'a str) -> Work<'a>,
}

pub(super) static SENSORS: &[Sensor] = &[
    Sensor {
        name: "meminfo",
        columns: "name bytes",
        help: "the node's memory as the kernel counts it",
        argument: None,
        read: |_, _| {
            let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
            let rows = memory(&text)
                .into_iter()
                .map(|(name, bytes)| vec![name, bytes.to_string()]);
            ready(rows.collect())
        },
    },
    Sensor {
        name: "load",
        columns: "load",
        help: "load average over one minute",
        argument: None,
        read: |meter, _| ready(vec![vec![format!("{:.2}", meter.node().load[0])]]),
    },
    Sensor {
        name: "load5",
        columns: "load",
        help: "load average over five minutes",
        argument: None,
        read: |meter, _| ready(vec![vec![format!("{:.2}", meter.node().load[1])]]),
    },
    Sensor {
        name: "uptime",
        columns: "seconds",
        help: "seconds since the node booted",
        argument: None,
        read: |meter, _| ready(vec![vec![meter.node().uptime_s.to_string()]]),
    },
    Sensor {
        name: "bandwidth",
        columns: "slice sent_bytes sent_packets dropped_packets received_bytes received_packets",
        help: "what a slice's sliver has sent and received: bandwidth/<slice>",
        argument: Some("<slice>"),
        read: |meter, slice| Box::pin(bandwidth(meter, slice)),
    },
    Sensor {
        name: "slivers",
        columns: "slice vm_id vm_type state cpu_us memory mem_limit disk disk_quota sent_bytes received_bytes",
        help: "all slivers, what they use and may use (bytes)",
        argument: None,
        read: |meter, _| Box::pin(slivers(meter)),
    },
];

fn ready(rows: Vec<Vec<String>>) -> Work<'static> {
    Box::pin(std::future::ready(Ok(rows)))
}

/// Reads the sensor that a path names, as lines.
pub(super) async fn read(meter: &Meter, path: &str) -> Result<String, SensorError> {
    let (name, rest) = path.split_once('/').unwrap_or((path, ""));
    let rows = match SENSORS.iter().find(|sensor| sensor.name == name) {
        Some(sensor) => {
            check_argument(sensor, rest)?;
            (sensor.read)(meter, rest).await?
        }
        None => published(meter, name, rest)?,
    };
    Ok(rows.iter().map(|row| line(row)).collect())
}

fn check_argument(sensor: &Sensor, rest: &str) -> Result<(), SensorError> {
    if sensor.argument.is_some() != rest.is_empty() {
        return Ok(());
    }
    Err(SensorError::Argument {
        sensor: sensor.name.to_owned(),
        what: match rest {
            "" => "an argument is missing".to_owned(),
            rest => format!("{rest:?} is too much"),
        },
        allowed: match sensor.argument {
            Some(argument) => format!("{}/{argument}", sensor.name),
            None => sensor.name.to_owned(),
        },
    })
}

/// A published table, with the columns that the path names: `nodes/ip/name`. None named: all of them.
fn published(meter: &Meter, name: &str, rest: &str) -> Rows {
    let Some((columns, rows)) = meter.published.get(name) else {
        let own = SENSORS.iter().map(|sensor| sensor.name.to_owned());
        let others = meter.published.names().into_iter().map(|(name, _)| name);
        return Err(SensorError::Unknown {
            name: name.to_owned(),
            allowed: own.chain(others).collect::<Vec<_>>().join(", "),
        });
    };
    if rest.is_empty() {
        return Ok(rows);
    }
    let places = rest.split('/').map(|wanted| {
        let place = columns.iter().position(|column| column == wanted);
        place.ok_or_else(|| SensorError::Argument {
            sensor: name.to_owned(),
            what: format!("no column {wanted:?}"),
            allowed: columns.join(", "),
        })
    });
    let places = places.collect::<Result<Vec<_>, _>>()?;
    let pick = |row: &Vec<String>| {
        places
            .iter()
            .filter_map(|place| row.get(*place).cloned())
            .collect()
    };
    Ok(rows.iter().map(pick).collect())
}

async fn bandwidth(meter: &Meter, name: &str) -> Rows {
    let refuse = |what: String, allowed: String| SensorError::Argument {
        sensor: "bandwidth".to_owned(),
        what,
        allowed,
    };
    let slice = meter
        .core
        .rules
        .slice(name)
        .map_err(|error| refuse(error.message.clone(), error.allowed.clone().unwrap_or_default()))?;
    let wanted = slice.to_string();
    let usage = meter
        .usage(&Caller::Owner)
        .await
        .map_err(|error| SensorError::Internal(error.message))?;
    let Some(of) = usage.slivers.iter().rfind(|sliver| sliver.slice == wanted) else {
        return Err(refuse(
            format!("slice {wanted} has no sliver on this node"),
            "a slice that the sensor slivers lists".to_owned(),
        ));
    };
    let numbers = [
        of.sent_bytes,
        of.sent_packets,
        of.dropped_packets,
        of.received_bytes,
        of.received_packets,
    ];
    let mut row = vec![of.slice.clone()];
    row.extend(numbers.map(|number| number.to_string()));
    Ok(vec![row])
}

async fn slivers(meter: &Meter) -> Rows {
    let usage = meter
        .usage(&Caller::Owner)
        .await
        .map_err(|error| SensorError::Internal(error.message))?;
    let row = |of: &mandoline_api::nodemgr::SliverUse| {
        let state = serde_json::to_value(of.state).unwrap_or_default();
        let mut row = vec![
            of.slice.clone(),
            of.vm_id.to_string(),
            of.vm_type.clone(),
            state.as_str().unwrap_or_default().to_owned(),
        ];
        let numbers = [
            of.cpu_us,
            of.memory,
            of.mem_limit,
            of.disk,
            of.disk_quota,
            of.sent_bytes,
            of.received_bytes,
        ];
        row.extend(numbers.map(|number| number.to_string()));
        row
    };
    Ok(usage.slivers.iter().map(row).collect())
}

/// One line, with its end. Values that hold a comma, a quote or a line's end are quoted.
pub(super) fn line<S: AsRef<str>>(values: &[S]) -> String {
    let mut line = String::new();
    for (place, value) in values.iter().enumerate() {
        if place > 0 {
            line.push(',');
        }
        let value = value.as_ref();
        match value.contains([',', '"', '\n', '\r']) {
            true => line.push_str(&format!("\"{}\"", value.replace('"', "\"\""))),
            false => line.push_str(value),
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_where_they_must_be() {
        assert_eq!(line(&["a", "1"]), "a,1\n");
        assert_eq!(line(&["a,b", "say \"x\"", ""]), "\"a,b\",\"say \"\"x\"\"\",\n");
    }

    #[test]
    fn arguments_are_checked_by_name() {
        let of = |name: &str| SENSORS.iter().find(|sensor| sensor.name == name).unwrap();
        assert!(check_argument(of("load"), "").is_ok());
        assert!(check_argument(of("bandwidth"), "x_y").is_ok());
        let error = check_argument(of("load"), "now").unwrap_err().to_string();
        assert!(error.contains("\"now\" is too much"), "{error}");
        let error = check_argument(of("bandwidth"), "").unwrap_err().to_string();
        assert!(error.contains("allowed: bandwidth/<slice>"), "{error}");
    }
}
