//! The XML form of an rspec, beside JSON, for the tools of PlanetLab's time:
//!
//! ```xml
//! <rspec>
//!   <attribute name="cpu_share">10</attribute>
//!   <attribute name="ports"><item>tcp/80</item><item>udp/5000-5010</item></attribute>
//!   <attribute name="x-note" type="json">{"a":1}</attribute>
//! </rspec>
//! ```
//!
//! Values are written as in JSON, in base units. `type="json"` is for what has no text of its own, or holds
//! characters that XML has not. There are no namespaces, no document type, no entities but the predefined.

use quick_xml::events::{BytesStart, BytesText, Event};
use quick_xml::reader::Reader;
use quick_xml::writer::Writer;
use quick_xml::{XmlVersion, escape};
use serde_json::Value as Json;

use crate::{Rspec, RspecError};

const ROOT: &str = "rspec";
const ATTRIBUTE: &str = "attribute";
const ITEM: &str = "item";

impl Rspec {
    /// The XML form; what it gives, [`Rspec::from_xml`] takes.
    pub fn to_xml(&self) -> String {
        let mut writer = Writer::new(Vec::new());
        // Writing to memory does not fail.
        let _ = write(&mut writer, self);
        String::from_utf8(writer.into_inner()).unwrap_or_default()
    }

    /// Reads the XML form. The caller bounds its length.
    pub fn from_xml(xml: &str) -> Result<Self, RspecError> {
        Parser {
            reader: Reader::from_str(xml),
            rspec: Rspec::new(),
        }
        .document()
    }
}

fn write(writer: &mut Writer<Vec<u8>>, rspec: &Rspec) -> std::io::Result<()> {
    writer.create_element(ROOT).write_inner_content(|writer| {
        for (name, value) in rspec.iter() {
            let json = value.to_json();
            let element = writer.create_element(ATTRIBUTE).with_attribute(("name", name));
            match &json {
                Json::String(text) if is_xml(text) => element.write_text_content(BytesText::new(text))?,
                Json::Number(_) | Json::Bool(_) if !name.starts_with("x-") => {
                    element.write_text_content(BytesText::new(&json.to_string()))?
                }
                Json::Array(items) if !name.starts_with("x-") && items.iter().all(is_item) => element
                    .write_inner_content(|writer| {
                        for text in items.iter().filter_map(Json::as_str) {
                            writer
                                .create_element(ITEM)
                                .write_text_content(BytesText::new(text))?;
                        }
                        Ok(())
                    })?,
                other => {
                    let text = in_xml(&other.to_string());
                    let element = element.with_attribute(("type", "json"));
                    element.write_text_content(BytesText::new(&text))?
                }
            };
        }
        Ok(())
    })?;
    Ok(())
}

fn is_item(json: &Json) -> bool {
    json.as_str().is_some_and(is_xml)
}

/// Whether XML can hold a text as it is: no character that XML 1.0 has not, no carriage return, which readers
/// turn into a newline.
fn is_xml(text: &str) -> bool {
    text.chars().all(is_xml_char)
}

fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// JSON text with what XML cannot hold as JSON's escapes: such characters stand in strings only.
fn in_xml(json: &str) -> String {
    json.chars()
        .map(|c| match is_xml_char(c) {
            true => c.to_string(),
            false => format!("\\u{:04x}", u32::from(c)),
        })
        .collect()
}

struct Parser<'a> {
    reader: Reader<&'a [u8]>,
    rspec: Rspec,
}

/// What an element holds.
enum Content {
    Text(String),
    Items(Vec<String>),
}

impl<'a> Parser<'a> {
    fn wrong(&self, problem: impl Into<String>) -> RspecError {
        RspecError::NotXml {
            at: self.reader.buffer_position(),
            problem: problem.into(),
        }
    }

    fn next(&mut self) -> Result<Event<'a>, RspecError> {
        match self.reader.read_event() {
            Ok(Event::Eof) => Err(self.wrong("it ends too early")),
            Ok(Event::DocType(_)) => Err(self.wrong("a document type; allowed: none")),
            Ok(event) => Ok(event),
            Err(error) => Err(self.wrong(error.to_string())),
        }
    }

    fn document(mut self) -> Result<Rspec, RspecError> {
        loop {
            match self.next()? {
                Event::Start(start) if name(&start) == ROOT => break,
                Event::Empty(start) if name(&start) == ROOT => return self.end(),
                Event::Decl(_) | Event::Comment(_) => {}
                Event::Text(text) if is_blank(&text) => {}
                _ => return Err(self.wrong(format!("no `{ROOT}`"))),
            }
        }
        loop {
            match self.next()? {
                Event::Start(start) if name(&start) == ATTRIBUTE => {
                    let (name, is_json) = self.heading(&start)?;
                    let content = self.content(ATTRIBUTE)?;
                    self.set(&name, is_json, content)?;
                }
                Event::Empty(start) if name(&start) == ATTRIBUTE => {
                    let (name, is_json) = self.heading(&start)?;
                    self.set(&name, is_json, Content::Text(String::new()))?;
                }
                Event::End(_) => return self.end(),
                Event::Comment(_) => {}
                Event::Text(text) if is_blank(&text) => {}
                _ => return Err(self.wrong(format!("something else than `{ATTRIBUTE}`"))),
            }
        }
    }

    /// Nothing but blanks and comments may follow.
    fn end(mut self) -> Result<Rspec, RspecError> {
        loop {
            match self.reader.read_event() {
                Ok(Event::Eof) => return Ok(self.rspec),
                Ok(Event::Comment(_)) => {}
                Ok(Event::Text(text)) if is_blank(&text) => {}
                Ok(_) => return Err(self.wrong(format!("something after `{ROOT}`"))),
                Err(error) => return Err(self.wrong(error.to_string())),
            }
        }
    }

    /// The `name` of an attribute, and whether its content is JSON.
    fn heading(&self, start: &BytesStart<'_>) -> Result<(String, bool), RspecError> {
        let (mut found, mut is_json) = (None, false);
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| self.wrong(error.to_string()))?;
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|error| self.wrong(error.to_string()))?;
            match (attribute.key.into_inner(), &*value) {
                ("name", name) => found = Some(name.to_owned()),
                ("type", "json") => is_json = true,
                (other, _) => return Err(self.wrong(format!("`{other}`; allowed: name, type=\"json\""))),
            }
        }
        match found {
            Some(name) => Ok((name, is_json)),
            None => Err(self.wrong("an attribute without a name")),
        }
    }

    /// Everything up to the end of the element that has begun.
    fn content(&mut self, within: &str) -> Result<Content, RspecError> {
        let (mut text, mut items) = (String::new(), None::<Vec<String>>);
        loop {
            match self.next()? {
                Event::Text(part) => text.push_str(&part.xml10_content()),
                Event::CData(part) => text.push_str(&part.xml10_content()),
                Event::GeneralRef(reference) => match reference.resolve_char_ref() {
                    Ok(Some(c)) => text.push(c),
                    _ => match escape::resolve_predefined_entity(&reference) {
                        Some(known) => text.push_str(known),
                        None => return Err(self.wrong("an entity; allowed: amp, lt, gt, apos, quot")),
                    },
                },
                Event::Comment(_) => {}
                Event::Start(start) if within == ATTRIBUTE && name(&start) == ITEM => {
                    let Content::Text(item) = self.content(ITEM)? else {
                        return Err(self.wrong("an item within an item"));
                    };
                    items.get_or_insert_default().push(item);
                }
                Event::Empty(start) if within == ATTRIBUTE && name(&start) == ITEM => {
                    items.get_or_insert_default().push(String::new());
                }
                Event::End(_) => break,
                _ => {
                    return Err(self.wrong(format!(
                        "something within `{within}` that is neither text nor `{ITEM}`"
                    )));
                }
            }
        }
        match items {
            Some(_) if !text.trim().is_empty() => Err(self.wrong("text beside items")),
            Some(items) => Ok(Content::Items(items)),
            None => Ok(Content::Text(text)),
        }
    }

    fn set(&mut self, name: &str, is_json: bool, content: Content) -> Result<(), RspecError> {
        let json = match content {
            Content::Items(items) => Json::from(items),
            Content::Text(text) if is_json => serde_json::from_str(&text)
                .map_err(|error| self.wrong(format!("attribute `{name}` is not JSON: {error}")))?,
            Content::Text(text) => Json::from(text),
        };
        if self.rspec.get(name).is_some() {
            return Err(self.wrong(format!("attribute `{name}` is given twice")));
        }
        self.rspec.set_json(name, &json)
    }
}

fn name<'b>(start: &'b BytesStart<'_>) -> &'b str {
    start.name().into_inner()
}

fn is_blank(text: &BytesText<'_>) -> bool {
    text.xml10_content().trim().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_form_that_the_head_of_this_file_shows() {
        let rspec = json!({"cpu_share": 10, "ports": ["tcp/80", "udp/5000-5010"], "x-note": {"a": 1}});
        let rspec = Rspec::from_json(&rspec).unwrap();
        assert_eq!(
            rspec.to_xml(),
            "<rspec><attribute name=\"cpu_share\">10</attribute><attribute name=\"ports\"><item>tcp/80</item>\
             <item>udp/5000-5010</item></attribute><attribute name=\"x-note\" type=\"json\">{&quot;a&quot;:1}\
             </attribute></rspec>"
        );
        let by_hand = "<?xml version=\"1.0\"?>\n<!-- mine -->\n<rspec>\n  <attribute name='cpu_share'>10</attribute>\n\
                       <attribute name='mem_limit'>256 MiB</attribute><attribute name='initscript'><![CDATA[a < b]]> \
                       &amp; &#99;</attribute>\n<attribute name='ports'>\n<item>tcp/80</item>\n</attribute></rspec>\n";
        let read = Rspec::from_xml(by_hand).unwrap();
        assert_eq!(read.number("mem_limit"), Some(256 << 20));
        assert_eq!(read.text("initscript"), Some("a < b & c"));
        assert_eq!(read.ports().to_string(), "tcp/80");
        assert!(Rspec::from_xml("<rspec/>").unwrap().is_empty());
    }

    #[test]
    fn what_is_refused_says_where_and_why() {
        for (xml, names) in [
            ("", "ends too early"),
            ("<rspec>", "ends too early"),
            ("<a/>", "no `rspec`"),
            ("hello", "no `rspec`"),
            ("<!DOCTYPE r [<!ENTITY a 'b'>]><rspec/>", "document type"),
            (
                "<rspec><attribute name='cpu_share'>&a;</attribute></rspec>",
                "entity",
            ),
            ("<rspec><attribute>1</attribute></rspec>", "without a name"),
            (
                "<rspec><attribute name='cpu_share' unit='x'>1</attribute></rspec>",
                "unit",
            ),
            (
                "<rspec><attribute name='x-a' type='json'>{</attribute></rspec>",
                "not JSON",
            ),
            (
                "<rspec><attribute name='ports'>tcp/1<item>tcp/2</item></attribute></rspec>",
                "beside items",
            ),
            (
                "<rspec><attribute name='ports'><item><item/></item></attribute></rspec>",
                "item",
            ),
            ("<rspec><cpu_share>1</cpu_share></rspec>", "something else"),
            ("<rspec/><rspec/>", "something after"),
            ("<rspec></a>", "a"),
        ] {
            let error = Rspec::from_xml(xml).unwrap_err();
            assert!(matches!(error, RspecError::NotXml { .. }), "{xml}: {error}");
            assert!(error.to_string().contains(names), "{xml}: {error}");
        }
        let twice = "<rspec><attribute name='cpu_share'>1</attribute><attribute name='cpu_share'>2</attribute></rspec>";
        assert!(Rspec::from_xml(twice).unwrap_err().to_string().contains("twice"));
        // A value that the table does not allow is refused as in JSON.
        let error = Rspec::from_xml("<rspec><attribute name='cpu_share'>0</attribute></rspec>").unwrap_err();
        assert_eq!(
            (error.attribute(), error.value()),
            (Some("cpu_share"), Some("\"0\""))
        );
    }

    /// Any rspec: for each attribute a value of its type, or none.
    pub(crate) fn any_rspec() -> impl Strategy<Value = Rspec> {
        let number = proptest::option::of(0u64..u64::from(u32::MAX));
        let text = proptest::option::of(any::<String>());
        let keys = proptest::collection::vec("[a-z<&>\"\u{e000}-\u{ffff}]{1,9} [ -~]{1,9}[!-~]", 0..3);
        let ports = proptest::collection::vec((any::<bool>(), 1u16..9, 0u16..9), 0..4);
        let foreign = proptest::option::of(prop_oneof![
            any::<String>().prop_map(Json::from),
            any::<bool>().prop_map(Json::from),
            any::<i32>().prop_map(Json::from),
            Just(json!(["a", {"b\u{fffe}": [1, null]}])),
        ]);
        (number, text, keys, ports, foreign, any::<bool>()).prop_map(
            |(number, text, keys, ports, foreign, flag)| {
                let mut rspec = Rspec::new();
                if let Some(number) = number {
                    let _ = rspec.set_json("base_rate", &number.into());
                    let _ = rspec.set_json("cpu_guarantee", &(number % 1001).into());
                }
                if let Some(text) = text {
                    let _ = rspec.set_json("initscript", &text.into());
                }
                let _ = rspec.set_json("keys", &keys.into());
                let ports: Vec<String> = ports
                    .iter()
                    .map(|(tcp, first, more)| {
                        format!("{}/{first}-{}", if *tcp { "tcp" } else { "udp" }, first + more)
                    })
                    .collect();
                let _ = rspec.set_json("ports", &ports.into());
                if let Some(foreign) = foreign {
                    let _ = rspec.set_json("x-a<\"&", &foreign);
                }
                let _ = rspec.set_json("cpu_capped", &flag.into());
                let _ = rspec.set_json("end_time", &"2026-12-01T00:00:00Z".into());
                rspec
            },
        )
    }

    proptest! {
        #[test]
        fn json_and_xml_say_the_same(rspec in any_rspec()) {
            let xml = rspec.to_xml();
            prop_assert_eq!(Rspec::from_xml(&xml).unwrap(), rspec.clone(), "{}", xml);
            prop_assert_eq!(Rspec::from_json(&rspec.to_json()).unwrap(), rspec);
        }

        #[test]
        fn no_text_makes_it_panic(xml in "(<(/?)(rspec|attribute|item)( name='(ports|x-a)')?/?>|[&;#a<>]|tcp/1){0,12}") {
            let _ = Rspec::from_xml(&xml);
        }
    }
}
