import sqlite3
from itertools import groupby

from deqcore.testing import SinkTests


class TestSqlite(SinkTests):
    sink = "sqlite"

    def options(self, folder):
        return {"path": str(folder / "monitor.db")}

    def read(self, folder):
        database = sqlite3.connect(folder / "monitor.db")
        try:
            found = database.execute("SELECT solve, step, metric, value FROM figures ORDER BY rowid").fetchall()
        finally:
            database.close()
        return [
            (step, {metric: value for *_, metric, value in rows})
            for (_, step), rows in groupby(found, lambda row: row[:2])
        ]
