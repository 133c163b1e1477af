"""Names in the language of a report: heads of columns, metrics, stages, reasons, facts of a machine, currencies."""

from __future__ import annotations

from typing import Final

HEADS_JA: Final[dict[str, str]] = {
    "data": "データ",
    "backend": "バックエンド",
    "model": "モデル",
    "solver": "ソルバー",
    "rtol": "許容誤差 rtol",
    "strategy": "手法",
    "gradient error": "勾配の誤差",
    "gradient cosine": "勾配のコサイン",
    "test accuracy %": "テスト精度 %",
    "forward ms": "順伝播 ms",
    "backward ms": "逆伝播 ms",
    "step ms": "ステップ ms",
    "training s": "学習 秒",
    "process s": "プロセス 秒",
    "step MB": "ステップ MB",
    "f forward": "順伝播の f",
    "vjps backward": "逆伝播の vjp",
}
"""Heads of the table of results; in English they are the table's own (table.COLUMNS, table.IDENTITY)."""

NAMES_JA: Final[dict[str, str]] = {
    "accuracy": "テスト精度（%）",
    "accuracy_difference": "厳密な勾配との精度差（ポイント、信頼区間の下限）",
    "time_ratio": "学習時間の比（対 厳密な勾配、信頼区間の上限）",
    "memory_ratio": "1 ステップのメモリの比（対 厳密な勾配、信頼区間の上限）",
    "gradient_error": "勾配の誤差",
    "cosine": "勾配のコサイン",
    "unconverged": "未収束の割合",
    "fallback": "フォールバックの割合",
    "failures": "失敗した学習の数",
    "seeds": "シード数",
    "pilot": "試行（pilot）",
    "shadow": "並行運用（shadow）",
    "rollout": "本番展開（rollout）",
    "production": "本番運用（production）",
    "diverged": "発散",
    "out of memory": "メモリ不足",
    "crashed": "異常終了",
    "killed": "強制終了",
    "error": "エラー",
    "unfit": "データとモデルの不一致",
    "cpu": "CPU",
    "cores": "コア数",
    "usable_cores": "使用可能なコア数",
    "memory_gib": "メモリ（GiB）",
    "system": "OS",
    "python": "Python",
    "packages": "パッケージ",
    "date": "測定日",
    "load_before": "開始時の負荷",
    "device": "デバイス",
    "trainings": "学習数",
    "JPY": "円",
    "USD": "米ドル",
    "EUR": "ユーロ",
}
"""Metrics and stages of gates, reasons of failures, facts of a machine, currencies. English keeps their names."""


def called(language: str, name: str) -> str:
    """Return what a language calls a metric, a stage, a reason, a fact or a currency; other names stay."""
    return NAMES_JA.get(name, name) if language == "ja" else name.replace("_", " ") if name in MACHINE else name


MACHINE: Final = ("usable_cores", "memory_gib", "load_before")


def head(language: str, title: str) -> str:
    """Return the head of a column of the table of results."""
    return HEADS_JA[title] if language == "ja" else title
