"""Published claims beside what the simulator says, claim by claim: `jaxsim reproduce NAME`.

    found = burstgpt.reproduce()     # runs the system's studies (scenarios/reproduce)
    found.claims                     # paper, ours, tolerance; the verdict follows from them
    found.draw(Path("burstgpt.png"))

`claim` decides, `runs` simulates, `show` prints; every other module but `command` is one system.
"""
