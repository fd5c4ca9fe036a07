-- One schema for SQLite and PostgreSQL, in the types that both give back alike: BIGINT, TEXT, DOUBLE PRECISION.
-- Booleans are 0 or 1; times are Unix seconds (events: microseconds); lists and structs are JSON text.
-- Rows of persons, sites, keys, nodes and slices stay when they are deleted, for audit.

-- Numbers are given out here, inside the transaction that uses them: no number comes twice, and events
-- become visible in the order of their numbers, so that a reader that remembers the last one misses none.
CREATE TABLE ids (
    name TEXT PRIMARY KEY,
    last BIGINT NOT NULL
);

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- Other authorities. Every object carries the one that it belongs to; NULL is ourselves.
CREATE TABLE peers (
    peer_id BIGINT PRIMARY KEY,
    peername TEXT NOT NULL UNIQUE,
    peer_url TEXT NOT NULL,
    ed25519_key TEXT
);

CREATE TABLE persons (
    person_id BIGINT PRIMARY KEY,
    email TEXT NOT NULL,
    password_hash TEXT,
    first_name TEXT NOT NULL,
    last_name TEXT NOT NULL,
    title TEXT,
    phone TEXT,
    url TEXT,
    bio TEXT,
    enabled BIGINT NOT NULL DEFAULT 0 CHECK (enabled IN (0, 1)),
    deleted BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    date_created BIGINT NOT NULL,
    last_updated BIGINT NOT NULL,
    peer_id BIGINT REFERENCES peers (peer_id),
    peer_person_id BIGINT
);
CREATE UNIQUE INDEX persons_email ON persons (email) WHERE deleted = 0 AND peer_id IS NULL;

CREATE TABLE person_role (
    person_id BIGINT NOT NULL REFERENCES persons (person_id),
    role_id BIGINT NOT NULL CHECK (role_id IN (10, 20, 30, 40)),
    PRIMARY KEY (person_id, role_id)
);

CREATE TABLE sites (
    site_id BIGINT PRIMARY KEY,
    name TEXT NOT NULL,
    abbreviated_name TEXT NOT NULL,
    login_base TEXT NOT NULL,
    is_public BIGINT NOT NULL DEFAULT 1 CHECK (is_public IN (0, 1)),
    enabled BIGINT NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    latitude DOUBLE PRECISION,
    longitude DOUBLE PRECISION,
    url TEXT,
    max_slices BIGINT NOT NULL DEFAULT 0,
    max_slivers BIGINT NOT NULL DEFAULT 1000,
    deleted BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    date_created BIGINT NOT NULL,
    last_updated BIGINT NOT NULL,
    peer_id BIGINT REFERENCES peers (peer_id),
    peer_site_id BIGINT
);
CREATE UNIQUE INDEX sites_login_base ON sites (login_base) WHERE deleted = 0 AND peer_id IS NULL;

CREATE TABLE person_site (
    person_id BIGINT NOT NULL REFERENCES persons (person_id),
    site_id BIGINT NOT NULL REFERENCES sites (site_id),
    PRIMARY KEY (person_id, site_id)
);
CREATE INDEX person_site_site ON person_site (site_id);

CREATE TABLE keys (
    key_id BIGINT PRIMARY KEY,
    person_id BIGINT NOT NULL REFERENCES persons (person_id),
    key_type TEXT NOT NULL,
    key_text TEXT NOT NULL,
    deleted BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    date_created BIGINT NOT NULL,
    peer_id BIGINT REFERENCES peers (peer_id),
    peer_key_id BIGINT
);
CREATE INDEX keys_person ON keys (person_id);

CREATE TABLE nodes (
    node_id BIGINT PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    hostname TEXT NOT NULL,
    site_id BIGINT NOT NULL REFERENCES sites (site_id),
    node_type TEXT NOT NULL DEFAULT 'regular',
    boot_state TEXT NOT NULL DEFAULT 'reinstall',
    run_level TEXT,
    model TEXT,
    version TEXT,
    -- NODE_KEY as its text stands in pl_node.txt; the authority has to know it to check an HMAC under it.
    node_key TEXT NOT NULL,
    ed25519_key TEXT,
    ssh_host_keys TEXT NOT NULL DEFAULT '[]',
    ssh_host TEXT,
    ssh_port BIGINT,
    vm_types TEXT NOT NULL DEFAULT '[]',
    attribute_table_version BIGINT,
    capacity TEXT NOT NULL DEFAULT '{}',
    deleted BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    date_created BIGINT NOT NULL,
    last_updated BIGINT NOT NULL,
    last_contact BIGINT,
    last_boot BIGINT,
    peer_id BIGINT REFERENCES peers (peer_id),
    peer_node_id BIGINT
);
CREATE UNIQUE INDEX nodes_hostname ON nodes (hostname) WHERE deleted = 0 AND peer_id IS NULL;

CREATE TABLE slices (
    slice_id BIGINT PRIMARY KEY,
    -- This slice and no other: deleted and made again under the same name is another slice.
    uuid TEXT NOT NULL UNIQUE,
    site_id BIGINT NOT NULL REFERENCES sites (site_id),
    name TEXT NOT NULL,
    instantiation TEXT NOT NULL,
    enabled BIGINT NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    url TEXT NOT NULL DEFAULT '',
    description TEXT NOT NULL DEFAULT '',
    max_nodes BIGINT NOT NULL DEFAULT 100,
    creator_person_id BIGINT REFERENCES persons (person_id),
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    deleted BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    deleted_at BIGINT,
    peer_id BIGINT REFERENCES peers (peer_id),
    peer_slice_id BIGINT
);
CREATE UNIQUE INDEX slices_name ON slices (name) WHERE deleted = 0 AND peer_id IS NULL;
CREATE INDEX slices_expires ON slices (expires) WHERE deleted = 0;

CREATE TABLE slice_person (
    slice_id BIGINT NOT NULL REFERENCES slices (slice_id),
    person_id BIGINT NOT NULL REFERENCES persons (person_id),
    PRIMARY KEY (slice_id, person_id)
);
CREATE INDEX slice_person_person ON slice_person (person_id);

CREATE TABLE slice_node (
    slice_id BIGINT NOT NULL REFERENCES slices (slice_id),
    node_id BIGINT NOT NULL REFERENCES nodes (node_id),
    PRIMARY KEY (slice_id, node_id)
);
CREATE INDEX slice_node_node ON slice_node (node_id);

CREATE TABLE tag_types (
    tag_type_id BIGINT PRIMARY KEY,
    tagname TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL,
    category TEXT NOT NULL,
    -- The least role that may set it: 10 admin, 20 pi, 30 user.
    min_role_id BIGINT NOT NULL
);

CREATE TABLE slice_tags (
    slice_tag_id BIGINT PRIMARY KEY,
    slice_id BIGINT NOT NULL REFERENCES slices (slice_id),
    -- NULL: of the whole slice.
    node_id BIGINT REFERENCES nodes (node_id),
    tag_type_id BIGINT NOT NULL REFERENCES tag_types (tag_type_id),
    value TEXT NOT NULL
);
CREATE INDEX slice_tags_slice ON slice_tags (slice_id);

CREATE TABLE initscripts (
    initscript_id BIGINT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    enabled BIGINT NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    script TEXT NOT NULL
);

-- Only the hash of a session's token is kept.
CREATE TABLE sessions (
    token_hash TEXT PRIMARY KEY,
    person_id BIGINT REFERENCES persons (person_id),
    node_id BIGINT REFERENCES nodes (node_id),
    created BIGINT NOT NULL,
    -- NULL: does not end by itself (nodes).
    expires BIGINT
);
CREATE INDEX sessions_expires ON sessions (expires);

-- What nodes said last of the slivers on them.
CREATE TABLE slivers (
    slice_id BIGINT NOT NULL REFERENCES slices (slice_id),
    node_id BIGINT NOT NULL REFERENCES nodes (node_id),
    seq BIGINT NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    reason TEXT,
    class TEXT,
    vm_id TEXT,
    initscript TEXT,
    address TEXT,
    ssh_host_keys TEXT NOT NULL DEFAULT '[]',
    phases_us TEXT NOT NULL DEFAULT '{}',
    updated BIGINT NOT NULL,
    PRIMARY KEY (slice_id, node_id)
);
CREATE INDEX slivers_node ON slivers (node_id);

-- Who did what to what: the audit trail, and the truth behind the event streams.
CREATE TABLE events (
    seq BIGINT PRIMARY KEY,
    time_us BIGINT NOT NULL,
    kind TEXT NOT NULL,
    actor_person_id BIGINT,
    actor_node_id BIGINT,
    person_id BIGINT,
    site_id BIGINT,
    slice_id BIGINT,
    node_id BIGINT,
    data TEXT NOT NULL,
    -- JSON list of the nodes whose set of slivers this changes.
    wakes TEXT NOT NULL DEFAULT '[]'
);

-- Nonces of signed calls, remembered for the replay window.
CREATE TABLE nonces (
    node_id BIGINT NOT NULL,
    nonce TEXT NOT NULL,
    expires BIGINT NOT NULL,
    PRIMARY KEY (node_id, nonce)
);
CREATE INDEX nonces_expires ON nonces (expires);
