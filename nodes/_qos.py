"""Qualities of service that both ends of a topic have to agree on."""

from __future__ import annotations

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

#: Chunks and their provenance: the newest one, from somebody who shows that he lives.
CHUNK = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, liveliness_lease_duration=Duration(seconds=0.5))
#: What is true until it is said otherwise: who joins late gets it.
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
#: The listener's side of it, where none that come in between may be lost.
HEAR_LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
