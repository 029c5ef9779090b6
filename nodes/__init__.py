"""ROS 2 shells, thin: parameters in, messages out. Needs rclpy; the core does not."""
