"""The store's statements run on one sqlite3 connection without SQLAlchemy's execution, which takes five times as long as SQLite itself here.

SQLAlchemy still compiles each statement and converts each value, by the same public rules; only pools, cursors, events and result objects are
left out. What is rare (defaults made in Python, sub-statements of an insert) goes SQLAlchemy's own way, on the same connection and transaction.
`before_begin` is asked before each transaction, `around` before and after each commit; both may end the process that acts.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

Processor = Callable[[Any], Any] | None


class Row:
    """One row: its columns as attributes, each converted when it is read, and all of them as the mapping that SQLAlchemy's rows have."""

    __slots__ = ("_found", "_prepared")

    def __init__(self, prepared: Prepared, found: tuple[Any, ...]) -> None:
        self._prepared, self._found = prepared, found

    def __getattr__(self, name: str) -> Any:
        place, convert = self._prepared.places[name]
        return self._found[place] if convert is None else convert(self._found[place])

    @property
    def _mapping(self) -> dict[str, Any]:
        row = dict(zip(self._prepared.places, self._found, strict=True))
        for name, convert in self._prepared.converted:
            if (value := row[name]) is not None:  # NULL is None in all our types
                row[name] = convert(value)
        return row

    def _first(self) -> Any:
        place, convert = next(iter(self._prepared.places.values()))
        return self._found[place] if convert is None else convert(self._found[place])


class Result(list[Row]):
    """All rows of one statement."""

    rowcount = -1

    def all(self) -> Result:
        return self

    def first(self) -> Row | None:
        return self[0] if self else None

    def one(self) -> Row:
        (row,) = self
        return row

    def scalar(self) -> Any:
        return self[0]._first() if self else None

    def scalars(self) -> list[Any]:
        return [row._first() for row in self]

    def scalar_one(self) -> Any:
        return self.one()._first()

    def scalar_one_or_none(self) -> Any:
        return self.one()._first() if self else None


class Prepared:
    """One compiled statement."""

    def __init__(self, compiled: Any, dialect: sa.Dialect) -> None:
        self.compiled, self.sql = compiled, str(compiled)
        self.expands = bool(compiled.post_compile_params or compiled.literal_execute_params)
        self.strange = bool(compiled.insert_prefetch or compiled.update_prefetch or getattr(compiled, "_insertmanyvalues", None))
        self.reads = bool(compiled.statement.is_select)
        self.names: Sequence[str] = compiled.positiontup or ()
        self.binds: Mapping[str, Any] = compiled._bind_processors
        columns: list[tuple[str, Processor]] = [(c.keyname, c.type._cached_result_processor(dialect, None)) for c in compiled._result_columns]
        self.places = {name: (place, convert) for place, (name, convert) in enumerate(columns)}
        self.converted = [(name, convert) for name, convert in columns if convert is not None]


class Bound:
    """One compiled statement with the values that were written into it; those that are given with it are converted at each use."""

    def __init__(self, prepared: Prepared, extracted: Any, keys: Sequence[str]) -> None:
        self.prepared, self._extracted = prepared, extracted
        self._simple = not prepared.expands and set(keys) <= set(prepared.names)
        if self._simple:
            written, binds = prepared.compiled.construct_params(extracted_parameters=extracted, escape_names=False, _check=False), prepared.binds
            self._plan = [
                (name, binds.get(name), None if name in keys else binds[name](written[name]) if name in binds else written[name]) for name in prepared.names
            ]
            missing = {name for bind, name in prepared.compiled.bind_names.items() if bind.required} - set(keys)
            self._simple = not missing & set(prepared.names)  # `construct_params` says what is missing

    def bind(self, params: dict[str, Any]) -> tuple[str, list[Any]]:
        """The SQL and the values for its question marks."""
        prepared = self.prepared
        if self._simple:
            return prepared.sql, [(convert(params[n]) if convert else params[n]) if n in params else written for n, convert, written in self._plan]
        values = prepared.compiled.construct_params(params, extracted_parameters=self._extracted, escape_names=False)
        if not prepared.expands:
            return prepared.sql, [prepared.binds[n](values[n]) if n in prepared.binds else values[n] for n in prepared.names]
        wide = prepared.compiled._process_parameters_for_postcompile(values)
        values = {**values, **wide.additional_parameters}
        binds = {**prepared.binds, **wide.processors}
        return wide.statement, [binds[n](values[n]) if n in binds else values[n] for n in wide.positiontup]


class DirectEngine:
    """As much of an engine as the store asks of one. `raw`: the one connection to the database."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        self.raw = raw
        self.before_begin: Callable[[], None] = lambda: None
        self.around: Callable[[str], None] = lambda edge: None
        engine = sa.create_engine("sqlite://", poolclass=StaticPool, creator=lambda: raw, hide_parameters=True)
        self.dialect = engine.dialect
        self.slow = engine.connect()  # never begins, commits or ends anything of its own
        self._compiled: dict[Any, Any] = {}

    def connect(self) -> DirectConnection:
        return DirectConnection(self)

    def prepare(self, statement: Any, params: Sequence[dict[str, Any]]) -> Bound:
        about = (*params[0], len(params) > 1)
        kept = statement.__dict__.get("_bound")  # a statement that is made once is looked up once
        if kept is None:
            statement._set_memoized_attribute("_bound", kept := {})  # so that a statement made from this one does not have it
        bound: Bound | None = kept.get(about)
        if bound is None:
            keys = sorted(params[0])
            compiled, extracted, *_ = statement._compile_w_cache(self.dialect, compiled_cache=self._compiled, column_keys=keys, for_executemany=len(params) > 1)
            prepared = compiled.__dict__.get("_prepared")
            if prepared is None:
                prepared = compiled._prepared = Prepared(compiled, self.dialect)
            bound = kept[about] = Bound(prepared, extracted, keys)
        return bound


class DirectConnection:
    """One transaction at most; it begins with the first statement, or with `begin`. Entered as a transaction, it is committed at the end."""

    __slots__ = ("_begun", "_engine", "_writes")

    def __init__(self, engine: DirectEngine) -> None:
        self._engine, self._begun, self._writes = engine, False, False

    def __enter__(self) -> DirectConnection:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun and self._engine.raw.in_transaction:
            self._engine.raw.rollback()

    def execution_options(self, *, repave_write: bool = False, repave_look: bool = False) -> DirectConnection:
        self._writes = repave_write
        return self

    def begin(self) -> _Transaction:
        self._begin()
        self._open()
        return _Transaction(self._engine)

    def _begin(self) -> None:
        self._engine.before_begin()
        self._begun = True

    def _open(self) -> None:
        self._engine.raw.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")

    def execute(self, statement: Any, params: dict[str, Any] | Sequence[dict[str, Any]] = ()) -> Any:
        engine = self._engine
        each = [params] if isinstance(params, dict) else list(params) or [{}]
        if not self._begun:
            self._begin()
        bound = engine.prepare(statement, each)
        prepared = bound.prepared
        if not prepared.reads and not engine.raw.in_transaction:
            self._open()  # what only reads has no need of it: nobody else comes between
        if prepared.strange:
            return engine.slow.execute(statement, params or None)
        result = Result()
        for one in each:
            sql, values = bound.bind(one)
            try:
                cursor = engine.raw.execute(sql, values)
            except sqlite3.Error as error:
                raise sa.exc.DBAPIError.instance(sql, None, error, sqlite3.Error) from error
            if prepared.places:
                result += [Row(prepared, found) for found in cursor.fetchall()]
            result.rowcount = cursor.rowcount
        return result


class _Transaction:
    """Committed at the end, or rolled back."""

    __slots__ = ("_engine",)

    def __init__(self, engine: DirectEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._engine.raw.rollback()
            return
        self._engine.around("before")
        self._engine.raw.commit()
        self._engine.around("after")
