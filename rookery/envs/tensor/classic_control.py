"""Gymnasium's five classic control tasks: its dynamics, observations, rewards, limits and thresholds, in float32.

Source: Gymnasium 1.4, `gymnasium/envs/classic_control`. Units are SI where the task has units; angles are in radians.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import State, TensorEnv

__all__ = ["Acrobot", "CartPole", "MountainCar", "MountainCarContinuous", "Pendulum"]

TURN = 2 * math.pi


def _symmetric_box(*high: float) -> spaces.Box:
    bound = np.array(high, dtype=np.float32)
    return spaces.Box(-bound, bound, dtype=np.float32)


def _wrapped(angle: Tensor) -> Tensor:
    """The angle in [-π, π]; exact for angles already there."""
    return angle - TURN * torch.round(angle / TURN)


class CartPole(TensorEnv):
    """Keep a pole upright on a cart by pushing left (0) or right (1); +1 a step (Barto, Sutton and Anderson 1983)."""

    id = "CartPole-v1"
    reward_threshold = 475.0
    default_max_steps = 500

    gravity = 9.8
    pole_mass = 0.1
    total_mass = 1.1
    half_length = 0.5  # of the pole
    force = 10.0
    seconds = 0.02  # a step
    x_limit = 2.4
    angle_limit = 12 * TURN / 360

    def build(self) -> None:
        self.obs_space = _symmetric_box(self.x_limit * 2, np.inf, self.angle_limit * 2, np.inf)
        self.action_space = spaces.Discrete(2)
        self._limits = self.constant([self.x_limit, math.inf, self.angle_limit, math.inf])
        self._push = self.constant(-self.force / self.total_mass), self.constant(2 * self.force / self.total_mass)
        self._arm = self.constant(self.half_length * 4 / 3 / self.gravity)
        self._one = torch.ones(self.lanes, device=self.device)

    def draw(self, generator: torch.Generator, *rows: int) -> Tensor:
        return torch.empty((*rows, self.lanes, 4), device=self.device).uniform_(-0.05, 0.05, generator=generator)

    def initial(self, noise: Tensor) -> State:
        return {"physics": noise}  # x, x', θ, θ'

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        physics = state["physics"]
        _, x_dot, angle, angle_dot = physics.unbind(-1)
        sin, cos = angle.sin(), angle.cos()
        share = self.pole_mass * self.half_length / self.total_mass
        left, both = self._push
        thrust = torch.addcmul(torch.addcmul(left, action, both), angle_dot * angle_dot, sin, value=share)
        # θ'' = (sin θ − cos θ · thrust / g) / (l/g (4/3 − m cos² θ / M)), in fused operations: this is the hot loop
        torque = torch.addcmul(sin, cos, thrust, value=-1.0 / self.gravity)
        angle_acc = torque / torch.addcmul(self._arm, cos, cos, value=-share / self.gravity)
        x_acc = torch.addcmul(thrust, angle_acc, cos, value=-share)
        rates = torch.stack((x_dot, x_acc, angle_dot, angle_acc), dim=-1)
        physics = physics.add(rates, alpha=self.seconds)
        return {"physics": physics}, self._one, (physics.abs() > self._limits).any(-1)

    def observe(self, state: State) -> Tensor:
        return state["physics"].clone()

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        x, _, angle, _ = state["physics"]
        canvas = drawing.Canvas(400, 240)
        left, rail = 200 + 75 * float(x), 190
        canvas.draw.line((0, rail, 400, rail), fill=drawing.INK, width=2)
        canvas.draw.rectangle((left - 28, rail - 28, left + 28, rail - 6), fill=drawing.INK)
        for wheel in (-16, 16):
            canvas.disc(left + wheel, rail - 5, 5, drawing.GREY)
        tip = (left + 130 * math.sin(angle), rail - 28 - 130 * math.cos(angle))
        canvas.draw.line((left, rail - 28, *tip), fill=drawing.AMBER, width=9)
        canvas.disc(left, rail - 28, 5, drawing.BLUE)
        return canvas.pixels()


class Acrobot(TensorEnv):
    """Swing a two-link arm's free end above a line by torque −1, 0 or +1 N·m at its elbow (Sutton 1996; book form).

    Both links are 1 m and 1 kg with their centres of mass halfway and a moment of inertia of 1 kg·m².
    """

    id = "Acrobot-v1"
    reward_threshold = -100.0
    default_max_steps = 500
    draws = 4

    gravity = 9.8
    seconds = 0.2  # a step
    speed_limits: ClassVar[tuple[float, float]] = (4 * math.pi, 9 * math.pi)

    def build(self) -> None:
        self.obs_space = _symmetric_box(1, 1, 1, 1, *self.speed_limits)
        self.action_space = spaces.Discrete(3)
        self._speed_limits = self.constant(self.speed_limits)

    def initial(self, noise: Tensor) -> State:
        return {"physics": noise * 0.2 - 0.1}  # θ1, θ2, θ1', θ2'

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        physics, torque = state["physics"], (action - 1).float()
        half = self.seconds / 2
        k1 = self._rates(physics, torque)
        k2 = self._rates(physics.add(k1, alpha=half), torque)
        k3 = self._rates(physics.add(k2, alpha=half), torque)
        k4 = self._rates(physics.add(k3, alpha=self.seconds), torque)
        physics = physics + self.seconds / 6 * (k1 + 2 * (k2 + k3) + k4)
        angles = _wrapped(physics[:, :2])
        speeds = torch.clamp(physics[:, 2:], -self._speed_limits, self._speed_limits)
        first = angles[:, 0]
        terminated = -first.cos() - (first + angles[:, 1]).cos() > 1.0
        return {"physics": torch.cat((angles, speeds), dim=-1)}, terminated.float() - 1.0, terminated

    def _rates(self, physics: Tensor, torque: Tensor) -> Tensor:
        """Time derivatives `[B, 4]` of the state `[B, 4]` (Sutton and Barto 1998, section 11.3)."""
        first, second, first_dot, second_dot = physics.unbind(-1)
        sin, cos = second.sin(), second.cos()
        d1 = 3.5 + cos
        d2 = 1.25 + 0.5 * cos
        phi2 = 0.5 * self.gravity * (first + second).sin()  # cos(x − π/2) = sin x
        phi1 = 1.5 * self.gravity * first.sin() + phi2 - sin * second_dot * (0.5 * second_dot + first_dot)
        ratio = d2 / d1
        second_acc = (torque + ratio * phi1 - 0.5 * first_dot * first_dot * sin - phi2) / (1.25 - d2 * ratio)
        first_acc = -(d2 * second_acc + phi1) / d1
        return torch.stack((first_dot, second_dot, first_acc, second_acc), dim=-1)

    def observe(self, state: State) -> Tensor:
        angles, speeds = state["physics"][:, :2], state["physics"][:, 2:]
        waves = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
        return torch.cat((waves, speeds), dim=-1)

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        first, second, _, _ = (float(value) for value in state["physics"])
        canvas = drawing.Canvas(300, 300)
        scale, x, y = 65.0, 150.0, 150.0
        canvas.draw.line((0, y - scale, 300, y - scale), fill=drawing.GREEN, width=2)
        for angle in (first, first + second):
            end_x, end_y = x + scale * math.sin(angle), y + scale * math.cos(angle)
            canvas.draw.line((x, y, end_x, end_y), fill=drawing.BLUE, width=9)
            canvas.disc(x, y, 7, drawing.AMBER)
            x, y = end_x, end_y
        canvas.disc(x, y, 5, drawing.INK)
        return canvas.pixels()


class MountainCar(TensorEnv):
    """Drive an underpowered car out of a valley by pushing left, not at all or right; −1 a step (Moore 1990)."""

    id = "MountainCar-v0"
    reward_threshold = -110.0
    default_max_steps = 200
    draws = 1

    low, high = -1.2, 0.6  # positions
    speed_limit = 0.07
    goal = 0.5

    def build(self) -> None:
        self.obs_space = spaces.Box(
            np.array([self.low, -self.speed_limit], np.float32), np.array([self.high, self.speed_limit], np.float32)
        )
        self.action_space = spaces.Discrete(3)
        self._cost = torch.full((self.lanes,), -1.0, device=self.device)

    def initial(self, noise: Tensor) -> State:
        position = noise * 0.2 - 0.6
        return {"physics": torch.cat((position, torch.zeros_like(position)), dim=-1)}  # position, velocity

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        physics, terminated = self._roll(state["physics"], (action - 1) * 0.001)
        return {"physics": physics}, self._cost, terminated

    def _roll(self, physics: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        """Position and velocity a step later `[B, 2]`, and whether the goal is reached `[B]`."""
        position, velocity = physics.unbind(-1)
        velocity = torch.clamp(velocity + push - 0.0025 * (3 * position).cos(), -self.speed_limit, self.speed_limit)
        position = torch.clamp(position + velocity, self.low, self.high)
        velocity = velocity.masked_fill((position == self.low) & (velocity < 0), 0.0)  # the wall stops the car
        reached = (position >= self.goal) & (velocity >= 0)
        return torch.stack((position, velocity), dim=-1), reached

    def observe(self, state: State) -> Tensor:
        return state["physics"].clone()

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        canvas = drawing.Canvas(400, 240)

        def place(position: float) -> tuple[float, float]:
            return (position - self.low) / (self.high - self.low) * 400, 210 - 160 * (
                math.sin(3 * position) * 0.5 + 0.5
            )

        hill = [place(position) for position in np.linspace(self.low, self.high, 100)]
        canvas.draw.line(hill, fill=drawing.INK, width=3)
        flag_x, flag_y = place(self.goal)
        canvas.draw.line((flag_x, flag_y, flag_x, flag_y - 40), fill=drawing.INK, width=2)
        canvas.draw.polygon(
            [(flag_x, flag_y - 40), (flag_x + 20, flag_y - 33), (flag_x, flag_y - 26)], fill=drawing.RED
        )
        car_x, car_y = place(float(state["physics"][0]))
        canvas.disc(car_x, car_y - 11, 10, drawing.BLUE)
        return canvas.pixels()


class MountainCarContinuous(MountainCar):
    """The valley with a force in [−1, 1]: −0.1 force² a step, +100 at the goal."""

    id = "MountainCarContinuous-v0"
    reward_threshold = 90.0
    default_max_steps = 999

    goal = 0.45

    def build(self) -> None:
        super().build()
        self.action_space = _symmetric_box(1.0)

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        force = action[:, 0]
        physics, terminated = self._roll(state["physics"], torch.clamp(force, -1.0, 1.0) * 0.0015)
        # The cost is of the force asked for, not of the clipped one: so it is in the original.
        return {"physics": physics}, 100.0 * terminated - 0.1 * force * force, terminated


class Pendulum(TensorEnv):
    """Swing a pendulum up and hold it there by a torque in [−2, 2] N·m; minus the cost of angle, speed and torque."""

    id = "Pendulum-v1"
    default_max_steps = 200
    draws = 2

    gravity = 10.0
    speed_limit = 8.0
    torque_limit = 2.0
    seconds = 0.05  # a step

    def build(self) -> None:
        self.obs_space = _symmetric_box(1.0, 1.0, self.speed_limit)
        self.action_space = _symmetric_box(self.torque_limit)
        self._reset_range = self.constant([TURN, 2.0])
        self._reset_low = self.constant([-math.pi, -1.0])
        self._never = torch.zeros(self.lanes, dtype=torch.bool, device=self.device)

    def initial(self, noise: Tensor) -> State:
        return {"physics": torch.addcmul(self._reset_low, noise, self._reset_range)}  # θ (0 is up), θ'

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        angle, speed = state["physics"].unbind(-1)
        torque = torch.clamp(action[:, 0], -self.torque_limit, self.torque_limit)
        cost = _wrapped(angle).square() + 0.1 * speed.square() + 0.001 * torque.square()
        speed = speed + (1.5 * self.gravity * angle.sin() + 3.0 * torque) * self.seconds
        speed = torch.clamp(speed, -self.speed_limit, self.speed_limit)
        angle = angle + speed * self.seconds
        return {"physics": torch.stack((angle, speed), dim=-1)}, -cost, self._never

    def observe(self, state: State) -> Tensor:
        angle, speed = state["physics"].unbind(-1)
        return torch.stack((angle.cos(), angle.sin(), speed), dim=-1)

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        angle = float(state["physics"][0])
        canvas = drawing.Canvas(240, 240)
        tip = (120 - 90 * math.sin(angle), 120 - 90 * math.cos(angle))
        canvas.draw.line((120, 120, *tip), fill=drawing.RED, width=18)
        canvas.disc(*tip, 9, drawing.RED)
        canvas.disc(120, 120, 6, drawing.INK)
        return canvas.pixels()
