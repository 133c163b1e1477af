"""The texts of the report in each language. Braces mark the figures; nothing else is translated."""

from __future__ import annotations

from typing import Final

EN: Final = {
    "title": "Study {name}",
    "answer": "Recommendation",
    "use": "For {model} on {data} ({backend}) use {strategy} with {solver}.",
    "use_unsure": "For {model} on {data} ({backend}) {strategy} with {solver} was the fastest setting that lost at "
    "most one point of accuracy, but there are too few seeds to recommend it.",
    "nothing": "For {model} on {data} ({backend}) no training finished.",
    "accuracy": "Its test accuracy is {accuracy} %.",
    "is_exact": "Nothing faster is shown to stay within one point of accuracy of exact gradients.",
    "time_exact": "Training takes {ratio} of the time with exact gradients; accuracy changes by {points} points.",
    "time_explicit": "Against the explicit network of equal size: {ratio} of the time, {points} points of accuracy.",
    "memory": "Training adds {ratio} of the memory that exact gradients add: a batch {batch} times as large fits in "
    "the same memory.",
    "devices": "Where memory decides, {fewer} devices suffice instead of the {devices} that exact gradients need.",
    "money": "One training costs {training}; a month of {count} trainings costs {month}.",
    "saved": "That is {saved} less per month than with exact gradients.",
    "lost": "That is {saved} more per month than with exact gradients.",
    "payback": "A switch that costs {switch} pays off after {months} months.",
    "interval": "In brackets: 95 % confidence intervals, paired over seeds.",
    "few_seeds": "Only {count} seed(s): differences may be due to chance. Use at least three seeds before you decide.",
    "low_cosine": "{strategy} with {solver}: the gradient's cosine with the exact one is {cosine} on average.",
    "harmful": "{strategy} with {solver} is harmful: accuracy changes by {points} points against exact gradients.",
    "unconverged": "{strategy} with {solver}: {percent} % of the solves missed their tolerance.",
    "failed": "{strategy} with {solver}, seed {seed}, did not finish: {reason}",
    "gates": "Gates",
    "stage": "stage",
    "criterion": "criterion",
    "strategy": "strategy",
    "measured": "measured",
    "verdict": "verdict",
    "go": "go",
    "no_go": "no-go",
    "go_all": "Go: every gate is passed.",
    "go_until": "Go for {passed}; no-go from {stage} on: {why}.",
    "no_go_first": "No-go: {stage} is not passed: {why}.",
    "rounds": "Retraining under drift",
    "round": "round {number}",
    "growth": "first to last",
    "rounds_note": "Test accuracy in % after each retraining on data that drifted further; in brackets the difference "
    "from exact gradients in points, paired over seeds; last column: how that difference changes from the first round "
    "to the last.",
    "builds_up": "{strategy} with {solver}: its gap to exact gradients builds up from round to round.",
    "no_build_up": "{strategy} with {solver}: its gap to exact gradients does not build up.",
    "results": "Results",
    "table_note": "Times are medians of a step; f and vjps are the counts of the slowest sample of a batch, averaged "
    "over steps; ± is half of the 95 % interval over seeds. Peak memory is that of the process (or the device) during "
    "training.",
    "plot_accuracy": "Validation accuracy against training time",
    "plot_time": "Time of a step, split",
    "plot_evaluations": "Evaluations of f and vjps over training",
    "plot_cosine": "Cosine of the gradient with the exact one",
    "plot_certificate": "Measured adjoint residual over training",
    "plot_radius": "Spectral radius of the Jacobian (median and largest sample)",
    "plot_memory": "Peak memory",
    "plot_rounds": "Difference from exact gradients over rounds of retraining",
    "configuration": "Settings",
    "machine": "Machine and versions",
    "again": "To reproduce",
    "made": "All figures were measured on this machine; the underlying numbers are in results.json.",
}
JA: Final = {
    "title": "評価報告：{name}",
    "answer": "結論",
    "use": "{data}（{backend}）の {model} には {strategy}（ソルバー {solver}）を推奨します。",
    "use_unsure": "{data}（{backend}）の {model} では、精度を 1 ポイントより多くは落とさない設定のうち "
    "{strategy}（{solver}）が最速でしたが、シードが少なく推奨できません。",
    "nothing": "{data}（{backend}）の {model} では最後まで学習できた設定がありません。",
    "accuracy": "テスト精度は {accuracy} % です。",
    "is_exact": "厳密な勾配より速く、かつ精度の差が 1 ポイント以内と示された設定はありません。",
    "time_exact": "学習時間は厳密な勾配の {ratio} 倍、精度の差は {points} ポイントです。",
    "time_explicit": "同規模の通常のネットワークに対し、時間は {ratio} 倍、精度の差は {points} ポイントです。",
    "memory": "学習で増えるメモリは厳密な勾配の {ratio} 倍です（同じメモリでバッチを {batch} 倍にできます）。",
    "devices": "メモリで台数が決まる場合、厳密な勾配の {devices} 台は {fewer} 台で足ります。",
    "money": "学習 1 回の費用は {training}、月 {count} 回で {month} です。",
    "saved": "厳密な勾配に比べ、月 {saved} の削減です。",
    "lost": "厳密な勾配に比べ、月 {saved} の増加です。",
    "payback": "切り替え費用 {switch} は {months} か月で回収できます。",
    "interval": "括弧内は 95 % 信頼区間（乱数シードごとに対応づけた差）です。",
    "few_seeds": "乱数シードが {count} 個だけなので、差は偶然かもしれません。判断の前に 3 個以上で実行してください。",
    "low_cosine": "{strategy}（{solver}）：厳密な勾配とのコサインが平均 {cosine} です。",
    "harmful": "{strategy}（{solver}）は有害です：厳密な勾配に対し精度が {points} ポイント変わります。",
    "unconverged": "{strategy}（{solver}）：求解の {percent} % が許容誤差に達していません。",
    "failed": "{strategy}（{solver}）、シード {seed} は正常に終わりませんでした：{reason}",
    "gates": "段階ごとの判定",
    "stage": "段階",
    "criterion": "基準",
    "strategy": "手法",
    "measured": "実測値",
    "verdict": "判定",
    "go": "可",
    "no_go": "不可",
    "go_all": "可：すべての基準を満たしています。",
    "go_until": "{passed} までは可、{stage} からは不可：{why}。",
    "no_go_first": "不可：{stage} の基準を満たしていません：{why}。",
    "rounds": "ドリフト下の再学習",
    "round": "第 {number} 回",
    "growth": "初回から最終回",
    "rounds_note": "データが少しずつ変化する中で再学習した後のテスト精度（%）。括弧内は厳密な勾配との差（ポイント、"
    "シードごとに対応づけ）。最後の列はその差の初回から最終回への変化です。",
    "builds_up": "{strategy}（{solver}）：厳密な勾配との差が回を追って蓄積しています。",
    "no_build_up": "{strategy}（{solver}）：誤差の蓄積は認められません。",
    "results": "結果",
    "table_note": "時間は 1 ステップの中央値。f と vjps はバッチ中で最も遅いサンプルの回数の平均。± は"
    "シードに対する 95 % 信頼区間の半幅。最大メモリは学習中のプロセス（またはデバイス）のものです。",
    "plot_accuracy": "検証精度と学習時間",
    "plot_time": "1 ステップの時間の内訳",
    "plot_evaluations": "学習中の f の評価回数と vjp の回数",
    "plot_cosine": "厳密な勾配とのコサイン",
    "plot_certificate": "学習中に測った随伴残差",
    "plot_radius": "ヤコビ行列のスペクトル半径（中央値と最大）",
    "plot_memory": "最大メモリ",
    "plot_rounds": "再学習の回ごとの厳密な勾配との差",
    "configuration": "設定",
    "machine": "計算機とバージョン",
    "again": "再現方法",
    "made": "すべてこの計算機での実測値です。元の数値は results.json にあります。",
}
HEADS_JA: Final[dict[str, str]] = {
    "data": "データ",
    "backend": "バックエンド",
    "model": "モデル",
    "solver": "ソルバー",
    "rtol": "rtol",
    "strategy": "手法",
    "test accuracy %": "テスト精度 %",
    "forward ms": "順伝播 ms",
    "backward ms": "逆伝播 ms",
    "step ms": "ステップ ms",
    "training s": "学習 秒",
    "peak MB": "最大メモリ MB",
    "f forward": "順伝播の f",
    "vjps backward": "逆伝播の vjp",
    "gradient cosine": "勾配のコサイン",
}
"""Heads of the table of results; in English they are the table's own (table.COLUMNS, table.IDENTITY)."""

LANGUAGES: Final[dict[str, dict[str, str]]] = {"en": EN, "ja": JA}


def say(language: str, word: str, **values: object) -> str:
    """Return a sentence in a language, with its figures."""
    return LANGUAGES[language][word].format(**values)


def head(language: str, title: str) -> str:
    """Return the head of a column of the table of results."""
    return HEADS_JA[title] if language == "ja" else title
