-- Operations, their stages, and the events that the bus has not taken yet. JSON where a column says so; times in
-- microseconds, absolute ones since the Unix epoch, a stage's since the operation was accepted.
CREATE TABLE op(
    id TEXT PRIMARY KEY,
    request TEXT UNIQUE,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    vm TEXT,
    owner INTEGER NOT NULL,
    input TEXT NOT NULL,            -- JSON
    trace TEXT,                     -- JSON [traceparent, tracestate]
    state TEXT NOT NULL,            -- JSON OpState
    cancel INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL,
    finished INTEGER,
    error TEXT,                     -- JSON Error
    result TEXT,                    -- JSON
    next_seq INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX op_unfinished ON op(id) WHERE finished IS NULL;

CREATE TABLE op_stage(
    op TEXT NOT NULL REFERENCES op(id) ON DELETE CASCADE,
    n INTEGER NOT NULL,             -- the order of beginning
    name TEXT NOT NULL,
    state TEXT NOT NULL,            -- JSON StageState
    started INTEGER NOT NULL,
    took INTEGER,
    note TEXT,
    output TEXT,                    -- JSON, what later stages get
    PRIMARY KEY (op, n),
    UNIQUE (op, name)
) STRICT, WITHOUT ROWID;

-- No reference to op: an event outlives its operation's row.
CREATE TABLE op_outbox(
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    event TEXT NOT NULL             -- JSON OpEvent
) STRICT;
