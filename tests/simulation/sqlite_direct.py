"""The store's statements run on one sqlite3 connection without SQLAlchemy's execution, which takes five times as long as SQLite itself here.

SQLAlchemy still compiles each statement and converts each value, by the same public rules; only pools, cursors, events and result objects are
left out. What is rare (defaults made in Python, sub-statements of an insert) goes SQLAlchemy's own way, on the same connection and transaction.
`before_begin` is asked before each transaction, `around` before and after each commit; both may end the process that acts.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

Processor = Callable[[Any], Any] | None


class Row(dict[str, Any]):
    """One row: its columns as attributes, and as the mapping that SQLAlchemy's rows have."""

    __slots__ = ()
    __getattr__ = dict.__getitem__

    @property
    def _mapping(self) -> Row:
        return self


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

    def scalars(self) -> list[Any]:
        return [next(iter(row.values())) for row in self]

    def scalar_one(self) -> Any:
        return next(iter(self.one().values()))

    def scalar_one_or_none(self) -> Any:
        return next(iter(self.one().values())) if self else None


class Prepared:
    """One compiled statement."""

    def __init__(self, compiled: Any, dialect: sa.Dialect) -> None:
        self.compiled, self.sql = compiled, str(compiled)
        self.expands = bool(compiled.post_compile_params or compiled.literal_execute_params)
        self.strange = bool(compiled.insert_prefetch or compiled.update_prefetch or getattr(compiled, "_insertmanyvalues", None))
        self.names: Sequence[str] = compiled.positiontup or ()
        self.binds: Mapping[str, Any] = compiled._bind_processors
        self.columns: list[tuple[str, Processor]] = [(c.keyname, c.type._cached_result_processor(dialect, None)) for c in compiled._result_columns]

    def bind(self, params: dict[str, Any], extracted: Any) -> tuple[str, list[Any]]:
        """The SQL and the values for its question marks."""
        values = self.compiled.construct_params(params, extracted_parameters=extracted, escape_names=False)
        if not self.expands:
            return self.sql, [self.binds[n](values[n]) if n in self.binds else values[n] for n in self.names]
        wide = self.compiled._process_parameters_for_postcompile(values)
        values = {**values, **wide.additional_parameters}
        binds = {**self.binds, **wide.processors}
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

    def prepare(self, statement: Any, params: Sequence[dict[str, Any]]) -> tuple[Prepared, Any]:
        keys, many = tuple(sorted(params[0])), len(params) > 1
        about = id(statement), keys, many  # a statement made from another one has its attributes too
        kept = statement.__dict__.get("_prepared")  # a statement that is made once is looked up once
        if kept is not None and kept[0] == about:
            return kept[1], kept[2]
        compiled, extracted, *_ = statement._compile_w_cache(self.dialect, compiled_cache=self._compiled, column_keys=list(keys), for_executemany=many)
        prepared = compiled.__dict__.get("_prepared")
        if prepared is None:
            prepared = compiled._prepared = Prepared(compiled, self.dialect)
        statement.__dict__["_prepared"] = about, prepared, extracted
        return prepared, extracted


class DirectConnection:
    """One transaction at most; it begins with the first statement, or with `begin`."""

    __slots__ = ("_begun", "_engine", "_writes")

    def __init__(self, engine: DirectEngine) -> None:
        self._engine, self._begun, self._writes = engine, False, False

    def __enter__(self) -> DirectConnection:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun and self._engine.raw.in_transaction:
            self._engine.raw.rollback()

    def execution_options(self, *, repave_write: bool = False) -> DirectConnection:
        self._writes = repave_write
        return self

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        except BaseException:
            self._engine.raw.rollback()
            raise
        self._engine.around("before")
        self._engine.raw.commit()
        self._engine.around("after")

    def _begin(self) -> None:
        self._engine.before_begin()
        self._engine.raw.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
        self._begun = True

    def execute(self, statement: Any, params: dict[str, Any] | Sequence[dict[str, Any]] = ()) -> Any:
        if not self._begun:
            self._begin()
        each = [params] if isinstance(params, dict) else list(params) or [{}]
        prepared, extracted = self._engine.prepare(statement, each)
        if prepared.strange:
            return self._engine.slow.execute(statement, params or None)
        columns, result = prepared.columns, Result()
        for one in each:
            sql, values = prepared.bind(one, extracted)
            try:
                cursor = self._engine.raw.execute(sql, values)
            except sqlite3.Error as error:
                raise sa.exc.DBAPIError.instance(sql, None, error, sqlite3.Error) from error
            for found in cursor.fetchall() if columns else ():
                row = Row()
                for (name, convert), value in zip(columns, found, strict=True):
                    row[name] = convert(value) if convert is not None else value
                result.append(row)
            result.rowcount = cursor.rowcount
        return result
