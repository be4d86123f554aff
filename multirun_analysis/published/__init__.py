"""Published figures as small tables (the first line of each file names its source), and quantities derived from them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from multirun_analysis import style
from multirun_analysis.figures import layout

FOLDER = Path(__file__).resolve().parent
# For models with fewer parameters than this, the process itself (interpreter, libraries) exceeds the model's state.
LEAST_PARAMETERS = 5e8


def _table(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv", comment="#")


def state_gib(
    parameters: pd.Series, num_ranks: pd.Series, tokens: pd.Series, num_layers: pd.Series, hidden_size: pd.Series
) -> pd.Series:
    """Minimum host memory, GiB, of ZeRO-3 with full offload and checkpoints in host memory.

    20 bytes per parameter (16-bit weights and gradients, fp32 gradients, master weights and two moments), and one 16-bit input
    per layer for each of `tokens` (sequence length times micro-batch) on each rank.
    """
    return (20 * parameters + 2 * num_ranks * tokens * num_layers * hidden_size) / 2**30


def training() -> pd.DataFrame:
    """The seed's results table, with `need_gib` (see state_gib) and `host_over_need` for its offloaded runs."""
    table = _table("training")
    tokens = table["seq_len_tokens"] * table["micro_batch_size"]
    need = state_gib(table["parameters"], table["num_gpus"], tokens, table["num_layers"], table["hidden_size"])
    table["need_gib"] = need.where(table["offload"] == "yes")
    return table.assign(host_over_need=table["host_gib"] / table["need_gib"])


def optimizer_steps() -> pd.DataFrame:
    """Milliseconds of a published Adam step by placement, with the time predicted for each weighting from the single nodes.

    The prediction: nodes process their shares in parallel and the slowest decides, T = max(share x time alone).
    """
    table = _table("optimizer_step")
    for cxl in (1, 2, 3, 4):
        share = cxl / (1 + cxl)
        alone = pd.DataFrame({"dram": (1 - share) * table["node_0"], "cxl": share * table["node_3"]})
        table[f"w1_{cxl}_predicted"] = alone.max(axis=1)
    return table


def copies() -> pd.DataFrame:
    """Published copy bandwidths by node set, GiB/s per GPU."""
    return _table("copies")


def comparable(df: pd.DataFrame) -> pd.DataFrame:
    """ldft's ok rows that are comparable with the published memory figures: full offload of a model of real size.

    Adds need_gib and host_over_need. Checkpoints count as host memory if they are kept there.
    """
    found = df[df["ok"] & (df["parameters"] >= LEAST_PARAMETERS) & (df["cfg.offload.optimizer"] == "cpu")]
    found = found[found["cfg.offload.parameters"] == "cpu"]
    tokens = found["seq_len_tokens"] * found["cfg.train.micro_batch_size"].astype("int64")
    tokens = tokens.where(found["cfg.checkpointing.mode"] == "cpu", 0)
    names = ("parameters", "cfg.launch.num_ranks", "cfg.model.num_layers", "cfg.model.hidden_size")
    parameters, ranks, layers, hidden = (found[name].astype("float64") for name in names)
    need = state_gib(parameters, ranks, tokens, layers, hidden)
    return found.assign(need_gib=need, host_over_need=found["peak_host_gib"] / need)


def host_memory(df: pd.DataFrame) -> Figure:
    """Host memory relative to what the state needs: the published runs, and comparable ldft runs."""
    theirs, ours = training().dropna(subset=["need_gib"]), comparable(df)
    labels = [f"{row.model} {style.length(row.seq_len_tokens)}, {row.setup}" for row in theirs.itertuples()]
    labels += [f"{row.model} {style.length(row.seq_len_tokens)} {row.policy}, ours" for row in ours.itertuples()]
    ratios = [*theirs["host_over_need"], *ours["host_over_need"]]
    with style.styled():
        figure = Figure(figsize=(style.WIDTH_IN, 0.28 * len(labels) + 0.8))
        axes = figure.subplots()
        colours = [style.OTHERS[0]] * len(theirs) + [style.OTHERS[1]] * len(ours)
        for place, (ratio, colour) in enumerate(zip(ratios, colours, strict=True)):
            axes.plot([1, ratio], [place, place], color=colour, linewidth=2)
            axes.plot([ratio], [place], "o", color=colour)
        axes.set_yticks(range(len(labels)), labels, fontsize=9)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0.98, max(ratios) * 1.03)
        axes.set_xlabel("peak host memory / memory that the state needs")
        finding = f"The published runs take {min(theirs['host_over_need']):.2f} to {max(theirs['host_over_need']):.2f} "
        finding += "times the host memory that their state needs"
        if len(ours):
            finding += f"; ours {ours['host_over_need'].min():.2f} to {ours['host_over_need'].max():.2f}"
        handles = [Line2D([], [], color=style.OTHERS[0], marker="o", label="published")]
        if len(ours):
            handles.append(Line2D([], [], color=style.OTHERS[1], marker="o", label="ours"))
        return layout.finish(figure, finding, handles)
