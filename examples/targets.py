"""Judge features by targets other than one class: several labels of an image, or numbers.

    python -m moco embed --checkpoint FILE --data.root PATH --output features
    python examples/targets.py features table.csv

The table has a header: `path` as in the features, a column for each target, and perhaps `group`,
such as a patient or a place, whose images are never on both sides of a split. A column of 0 and 1
is a label, any other one a number, and an empty cell is unknown. Each target gets a linear model,
tested on images that it was not fitted to (five folds).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS = 5


def main(features: str, table: str) -> pd.DataFrame:
    """Return the scores of each target."""
    vectors = pd.read_parquet(Path(features, "features.parquet"), columns=["path", "vector"])
    rows = vectors.merge(pd.read_csv(table), on="path", validate="one_to_one")
    if rows.empty:
        raise SystemExit(f"no path of {table} is in {features}: write them as there")
    targets = rows.columns.drop(["path", "vector", "group"], errors="ignore")
    return pd.DataFrame([score(rows.dropna(subset=name), name) for name in targets])


def score(rows: pd.DataFrame, name: str) -> dict[str, object]:
    """Fit and test one target: average precision and area under ROC in percent, or R2."""
    x, y = np.stack(rows["vector"].to_list()), rows[name].to_numpy(float)
    groups = rows["group"] if "group" in rows else rows["path"]
    found = {"target": name, "images": len(y)}
    if not set(y) <= {0, 1}:
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 6, 17)))
        guess = cross_val_predict(model, x, y, groups=groups, cv=GroupKFold(FOLDS))
        return found | {"R2": round(r2_score(y, guess), 3)}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    how = {"cv": StratifiedGroupKFold(FOLDS), "method": "decision_function"}
    guess = cross_val_predict(model, x, y, groups=groups, **how)
    precision, area = average_precision_score(y, guess), roc_auc_score(y, guess)
    return found | {
        "share of 1": round(100 * y.mean(), 1),
        "average precision": round(100 * precision, 1),
        "area under ROC": round(100 * area, 1),
    }


if __name__ == "__main__":
    print(main(*sys.argv[1:]).to_string(index=False))
