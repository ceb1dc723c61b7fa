"""Error of tables, apart from `diffagent.schemas.rows`: catching it loads no Arrow."""


class TableError(ValueError):
    """A file whose columns are not those of its table; the message names file and remedy."""
