"""From costs to a plan: what a Plan is (``schema``), and how a byte budget is spent (``allocate``, on ``knapsack``)."""

from .allocate import FrontPoint, choose, pareto_front, plan_of, solve
from .joint import solve_joint, solve_kv
from .knapsack import Allocation
from .kv import KVPlan, KVSpec, Mixed
from .schema import KEEP, Bands, Cut, Decision, Plan, Tiles

__all__ = ["KEEP", "Allocation", "Bands", "Cut", "Decision", "FrontPoint", "KVPlan", "KVSpec", "Mixed", "Plan", "Tiles", "choose", "pareto_front",
           "plan_of", "solve", "solve_joint", "solve_kv"]
