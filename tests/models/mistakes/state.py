"""Mistakes in what streams declare, in pages, trimming, snapshots and files."""

from __future__ import annotations

from tests.models.planting import Mistake

_SESSIONS = "tests.models.test_sessions:test_"
_SPEC, _PAGES, _STORE, _STEP, _FILE = (f"tensorgraph/state{name}.py" for name in ("", "_pages", "_store", "_step", "_file"))
_SIZES = "tools/inspect.py"
_TESTS = "tests.core.test_state_store:test_"

STATE = (
    # The fields of StateSpec: row_shape, dtype, every, keep.
    Mistake("row_shape is not in the key", _SPEC, "'x'.join(map(str, self.row_shape))", "''", "declared_state"),
    Mistake(
        "row_shape does not count in bytes",
        _SPEC,
        "size_bytes(math.prod(self.row_shape))",
        "size_bytes(self.row_shape[0])",
        f"{_TESTS}a_spec_says_its_class_key_and_bytes",
    ),
    Mistake("dtype is the session's", _SPEC, "width = self.dtype or kv_dtype, ", "width = kv_dtype, ", "declared_state"),
    Mistake(
        "pages are all f32",
        _STORE,
        "else (0, page_rows, *row), dtype)",
        "else (0, page_rows, *row), np.float32)",
        f"{_TESTS}rows_are_rounded_to_the_dtype_of_the_stream",
    ),
    Mistake("every is ignored", _SPEC, "StreamClass(self.every, self.keep)", "StreamClass(1, self.keep)", "declared_state"),
    Mistake("keep is ignored", _SPEC, "StreamClass(self.every, self.keep)", "StreamClass(self.every, None)", "declared_state"),
    Mistake(
        "a row before its block is complete",
        _SPEC,
        "return length // self.every",
        "return -(-length // self.every)",
        "rows_of_streams",
    ),
    Mistake(
        "readers look one row too short",
        _SPEC,
        "(length + 1) // self.every - self.keep)",
        "(length + 1) // self.every - self.keep + 1)",
        "rows_of_streams",
    ),
    Mistake(
        "readers look back too far",
        _SPEC,
        "return 0 if self.keep is None else max(",
        "return 0 if True else max(",
        "rows_of_streams",
    ),
    Mistake("sizes forget every", _SIZES, "s.row_bytes(kv_dtype) / s.every", "s.row_bytes(kv_dtype)", f"{_TESTS}published_sizes"),
    # Pages.
    Mistake(
        "pages are used again as they are",
        _PAGES,
        "            array[again] = 0\n",
        "            pass\n",
        f"{_TESTS}a_page_that_is_used_again_is_zero",
    ),
    Mistake(
        "a shared page is written to",
        _PAGES,
        "self.refs[pages[-1]] > 1:",
        "self.refs[pages[-1]] > 2:",
        f"{_TESTS}forks_share_pages_until_one_of_them_writes",
    ),
    Mistake(
        "a page's copy is empty",
        _PAGES,
        "array[copy[0]] = array[pages[-1]]",
        "pass",
        f"{_TESTS}forks_share_pages_until_one_of_them_writes",
    ),
    Mistake(
        "full pages are copied too",
        _PAGES,
        "if start % self.page_rows and self.refs",
        "if len(pages) and self.refs",
        "full_pages_are_shared",
    ),
    Mistake("rows lie one page off", _PAGES, "base = self.first // page_rows", "base = 0", "v4"),
    Mistake(
        "a table begins within a page",
        _PAGES,
        "Table(row // self.page_rows * self.page_rows, table",
        "Table(row, table",
        f"{_TESTS}trim_reaches_what_is_retained_and_says_what_that_is",
    ),
    Mistake(
        "pages never fall out",
        _PAGES,
        "table.pages[n:]) if n > 0 else table",
        "table.pages[n:]) if n > 999 else table",
        f"{_TESTS}pages_fall_out_of_keep_and_no_more_are_used",
    ),
    Mistake("a page falls out too early", _STEP, "cls.first_read(max(0, n - store.slack))", "cls.first_read(n) + 1", "v4"),
    Mistake(
        "no slack",
        _STEP,
        "cls.first_read(max(0, n - store.slack))",
        "cls.first_read(n)",
        f"{_TESTS}slack_tokens_can_always_be_trimmed",
    ),
    Mistake(
        "rows of a batch are written in another order",
        _PAGES,
        "zip(self._tables, self.start, self.stop, strict=True)",
        "zip(self._tables[::-1], self.start, self.stop, strict=True)",
        "llama",
    ),
    Mistake(
        "a freed page is lost",
        _PAGES,
        "self.unused.extend(pages[self.refs[pages] == 0].tolist())",
        "pass",
        f"{_TESTS}pages_fall_out_of_keep_and_no_more_are_used",
    ),
    # Trim, snapshots, forks.
    Mistake(
        "trim goes too far",
        _SPEC,
        "* self.every - 1 if first_row",
        "* self.every - 2 if first_row",
        f"{_TESTS}trim_reaches_what_is_retained_and_says_what_that_is",
    ),
    Mistake(
        "trim does not go far enough",
        _SPEC,
        "* self.every - 1 if first_row",
        "* self.every if first_row",
        f"{_TESTS}trim_reaches_what_is_retained_and_says_what_that_is",
    ),
    Mistake(
        "trim leaves pages",
        _PAGES,
        "return Table(table.first, table.pages[: -(-n_rows",
        "return Table(table.first, table.pages[: 1 - (-n_rows",
        f"{_SESSIONS}trim_leaves_a_fork_as_it_is:llama",
    ),
    Mistake(
        "trim trusts snapshots of other tokens",
        _STORE,
        "min(n, reach) for snapshot",
        "n for snapshot",
        f"{_TESTS}trim_falls_back_on_the_nearest_snapshot_of_the_same_history",
    ),
    Mistake(
        "trim uses released snapshots",
        _STORE,
        "if n and not snapshot.released}",
        "if n}",
        f"{_TESTS}trim_falls_back_on_the_nearest_snapshot_of_the_same_history",
    ),
    Mistake(
        "a fork has no snapshots",
        _STORE,
        "dict(entry.history)))",
        "{}))",
        f"{_TESTS}trim_falls_back_on_the_nearest_snapshot_of_the_same_history",
    ),
    Mistake(
        "a snapshot does not hold its pages",
        _STORE,
        "        self._hold(entry.state)\n        entry.history[snapshot]",
        "        entry.history[snapshot]",
        f"{_SESSIONS}snapshot_then_restore:llama",
    ),
    Mistake(
        "a fork does not hold its pages",
        _STORE,
        "        self._hold(entry.state)\n        return self._add",
        "        return self._add",
        f"{_SESSIONS}fork_at_77_and_continue_both:llama",
    ),
    # Steps and files.
    Mistake(
        "a step that fails leaves its pages",
        _STEP,
        "            self.is_open, self.store._open = False, None\n            self._release_fresh()",
        "            self.is_open, self.store._open = False, None",
        f"{_TESTS}a_step_that_is_left_by_an_error_leaves_nothing",
    ),
    Mistake(
        "a file is read without its checksum",
        _FILE,
        'if about["crc32"].get(name) != _checksum(given):',
        "if False:",
        "damaged_file",
    ),
    Mistake(
        "a file's rows stand at the beginning",
        _STORE,
        "table.slots(table.first, n_rows, self.page_rows))\n        first",
        "table.slots(table.first, n_rows, self.page_rows)[::-1])\n        first",
        "saved",
    ),
    Mistake("the state of another model is taken", _FILE, "    if given != wanted:", "    if False:", "another_models_file"),
)
