"""The phases of a step, in the order of `jaxsim.engine.step`, each written for one scenario.

An event is an iteration's end, an arrival, a door that opens, or a scheduling pass still under way; most phases have
nothing to do in most steps, and leave everything as it is.
"""

from jaxsim.engine.phases.arrivals import give_up, look, open_door, receive
from jaxsim.engine.phases.ends import retire, settle
from jaxsim.engine.phases.launches import launch, price
from jaxsim.engine.phases.passes import fill, look_up, open_pass

__all__ = ["fill", "give_up", "launch", "look", "look_up", "open_door", "open_pass", "price", "receive", "retire",
           "settle"]
