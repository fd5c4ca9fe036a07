//! PLCAPI's objects, field by field, under PlanetLab's names.

use super::{Field, From, Object, f};

pub(in crate::plc) static PERSON: Object = Object {
    name: "Person",
    table: "persons",
    alive: "deleted = 0",
    key: "person_id",
    named: Some("email"),
    folded: true,
    tags: None,
    fields: &[
        f("person_id", From::Int("person_id")),
        f("first_name", From::Text("first_name")),
        f("last_name", From::Text("last_name")),
        f("title", From::Text("title")),
        f("email", From::Text("email")),
        f("phone", From::Text("phone")),
        f("url", From::Text("url")),
        f("bio", From::Text("bio")),
        f("enabled", From::Bool("enabled")),
        f("last_updated", From::Int("last_updated")),
        f("date_created", From::Int("date_created")),
        f(
            "role_ids",
            From::Ints("SELECT person_id, role_id FROM person_role ORDER BY role_id"),
        ),
        f(
            "roles",
            From::Texts(
                "SELECT person_id, CASE role_id WHEN 10 THEN 'admin' WHEN 20 THEN 'pi' WHEN 30 THEN 'user' \
                 ELSE 'tech' END FROM person_role ORDER BY role_id",
            ),
        ),
        f(
            "site_ids",
            From::Ints("SELECT person_id, site_id FROM person_site ORDER BY site_id"),
        ),
        f(
            "key_ids",
            From::Ints("SELECT person_id, key_id FROM keys WHERE deleted = 0 ORDER BY key_id"),
        ),
        f(
            "slice_ids",
            From::Ints("SELECT person_id, slice_id FROM slice_person ORDER BY slice_id"),
        ),
        f("peer_id", From::Int("peer_id")),
        f("peer_person_id", From::Int("peer_person_id")),
        f("person_tag_ids", From::Empty),
    ],
};

pub(in crate::plc) static SITE: Object = Object {
    name: "Site",
    table: "sites",
    alive: "deleted = 0",
    key: "site_id",
    named: Some("login_base"),
    folded: false,
    tags: None,
    fields: &[
        f("site_id", From::Int("site_id")),
        f("name", From::Text("name")),
        f("abbreviated_name", From::Text("abbreviated_name")),
        f("login_base", From::Text("login_base")),
        f("is_public", From::Bool("is_public")),
        f("enabled", From::Bool("enabled")),
        f("latitude", From::Double("latitude")),
        f("longitude", From::Double("longitude")),
        f("url", From::Text("url")),
        f("date_created", From::Int("date_created")),
        f("last_updated", From::Int("last_updated")),
        f("max_slices", From::Int("max_slices")),
        f("max_slivers", From::Int("max_slivers")),
        f(
            "person_ids",
            From::Ints("SELECT site_id, person_id FROM person_site ORDER BY person_id"),
        ),
        f(
            "slice_ids",
            From::Ints("SELECT site_id, slice_id FROM slices WHERE deleted = 0 ORDER BY slice_id"),
        ),
        f("address_ids", From::Empty),
        f("pcu_ids", From::Empty),
        f(
            "node_ids",
            From::Ints("SELECT site_id, node_id FROM nodes WHERE deleted = 0 ORDER BY node_id"),
        ),
        f("peer_id", From::Int("peer_id")),
        f("peer_site_id", From::Int("peer_site_id")),
        f("site_tag_ids", From::Empty),
        f("ext_consortium_id", From::Nil),
    ],
};

pub(in crate::plc) static NODE: Object = Object {
    name: "Node",
    table: "nodes",
    alive: "deleted = 0",
    key: "node_id",
    named: Some("hostname"),
    folded: true,
    tags: None,
    fields: &[
        f("node_id", From::Int("node_id")),
        f("node_type", From::Text("node_type")),
        f("hostname", From::Text("hostname")),
        f("site_id", From::Int("site_id")),
        f("boot_state", From::Text("boot_state")),
        f("run_level", From::Text("run_level")),
        f("model", From::Text("model")),
        Field {
            name: "boot_nonce",
            from: From::Nil,
            secret: true,
        },
        f("version", From::Text("version")),
        f("ssh_rsa_key", From::Nil),
        f("date_created", From::Int("date_created")),
        f("last_updated", From::Int("last_updated")),
        f("last_contact", From::Int("last_contact")),
        f("last_boot", From::Int("last_boot")),
        f("last_download", From::Nil),
        f("last_pcu_reboot", From::Nil),
        f("last_pcu_confirmation", From::Nil),
        f("last_time_spent_online", From::Nil),
        f("last_time_spent_offline", From::Nil),
        // A node is verified when it has proved that it holds its key.
        f(
            "verified",
            From::Bool("CASE WHEN ed25519_key IS NULL THEN 0 ELSE 1 END"),
        ),
        Field {
            name: "key",
            from: From::Text("node_key"),
            secret: true,
        },
        Field {
            name: "session",
            from: From::Nil,
            secret: true,
        },
        f("interface_ids", From::Empty),
        f("conf_file_ids", From::Empty),
        f(
            "slice_ids",
            From::Ints("SELECT node_id, slice_id FROM slice_node ORDER BY slice_id"),
        ),
        f("slice_ids_whitelist", From::Empty),
        f("pcu_ids", From::Empty),
        f("ports", From::Empty),
        f("peer_id", From::Int("peer_id")),
        f("peer_node_id", From::Int("peer_node_id")),
        f("node_tag_ids", From::Empty),
        f("nodegroup_ids", From::Empty),
    ],
};

pub(in crate::plc) static SLICE: Object = Object {
    name: "Slice",
    table: "slices",
    alive: "deleted = 0",
    key: "slice_id",
    named: Some("name"),
    folded: false,
    tags: Some(
        "SELECT t.slice_id, y.tagname, t.value FROM slice_tags t \
         JOIN tag_types y ON y.tag_type_id = t.tag_type_id WHERE t.node_id IS NULL ORDER BY t.slice_tag_id",
    ),
    fields: &[
        f("slice_id", From::Int("slice_id")),
        f("site_id", From::Int("site_id")),
        f("name", From::Text("name")),
        f("instantiation", From::Text("instantiation")),
        f("url", From::Text("url")),
        f("description", From::Text("description")),
        f("max_nodes", From::Int("max_nodes")),
        f("creator_person_id", From::Int("creator_person_id")),
        f("created", From::Int("created")),
        f("expires", From::Int("expires")),
        f(
            "node_ids",
            From::Ints("SELECT slice_id, node_id FROM slice_node ORDER BY node_id"),
        ),
        f(
            "person_ids",
            From::Ints("SELECT slice_id, person_id FROM slice_person ORDER BY person_id"),
        ),
        f(
            "slice_tag_ids",
            From::Ints("SELECT slice_id, slice_tag_id FROM slice_tags ORDER BY slice_tag_id"),
        ),
        f("peer_id", From::Int("peer_id")),
        f("peer_slice_id", From::Int("peer_slice_id")),
    ],
};

pub(in crate::plc) static KEY: Object = Object {
    name: "Key",
    table: "keys",
    alive: "deleted = 0",
    key: "key_id",
    named: None,
    folded: false,
    tags: None,
    fields: &[
        f("key_id", From::Int("key_id")),
        f("key_type", From::Text("key_type")),
        f("key", From::Text("key_text")),
        f("person_id", From::Int("person_id")),
        f("peer_id", From::Int("peer_id")),
        f("peer_key_id", From::Int("peer_key_id")),
    ],
};

pub(in crate::plc) static SLICE_TAG: Object = Object {
    name: "SliceTag",
    table: "slice_tags JOIN tag_types USING (tag_type_id) JOIN slices USING (slice_id)",
    alive: "deleted = 0",
    key: "slice_tag_id",
    named: None,
    folded: false,
    tags: None,
    fields: &[
        f("slice_tag_id", From::Int("slice_tag_id")),
        f("slice_id", From::Int("slice_id")),
        f("name", From::Text("slices.name")),
        f("node_id", From::Int("slice_tags.node_id")),
        f("nodegroup_id", From::Nil),
        f("tag_type_id", From::Int("tag_type_id")),
        f("tagname", From::Text("tagname")),
        f("description", From::Text("tag_types.description")),
        f("category", From::Text("category")),
        f("value", From::Text("value")),
    ],
};

pub(in crate::plc) static INITSCRIPT: Object = Object {
    name: "InitScript",
    table: "initscripts",
    alive: "1 = 1",
    key: "initscript_id",
    named: Some("name"),
    folded: false,
    tags: None,
    fields: &[
        f("initscript_id", From::Int("initscript_id")),
        f("name", From::Text("name")),
        f("enabled", From::Bool("enabled")),
        f("script", From::Text("script")),
    ],
};
