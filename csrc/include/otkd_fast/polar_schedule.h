// The odd quintics s -> a s + b s^3 + c s^5 whose composition takes every singular value of [lowest, top] to 1.
//
// Each step is the minimax approximation of 1 on the interval that the step before leaves (greedy composition, as in Polar
// Express, arXiv 2505.16932), found by the Remez algorithm with two guards: an interval is never taken shorter than
// 1 : 0.1 (cushion), else the largest values are sent down to the smallest and rounding turns into a change of sign; and
// every argument but the last one's is divided by 1.01 (safety), so that a norm that rounding made too large is not
// sent to infinity. A tail of the schedule is the schedule for a shorter interval: start at the last row whose `lowest`
// is small enough, with the matrix scaled to a norm of at most that row's `top`.
#pragma once
#include <type_traits>

namespace otkd_fast {

struct PolarStep {
    double a, b, c;
    double top;     // norm of the matrix that the step expects
    double lowest;  // s / top from which on the rest of the schedule ends within 3e-7 (float), 2e-15 (double) of 1
};

constexpr PolarStep kPolarSteps32[] = {
    {7.634421283044, -18.54231001543, 12.74328247042, 1, 9e-06},
    {3.816937602264, -2.317801680839, 0.3982605069048, 1.999922892, 3.5e-05},
    {3.815738358254, -2.317583659523, 0.398310731896, 1.999702742, 0.00014},
    {3.811124150722, -2.316746378859, 0.3985048807007, 1.998854398, 0.00051},
    {3.793474478721, -2.313567152962, 0.3992609248311, 1.995590311, 0.002},
    {3.727464727554, -2.302024238949, 0.4022869990573, 1.98310488, 0.0073},
    {3.500652446479, -2.267482790709, 0.4155935127278, 1.936405716, 0.028},
    {2.873213174375, -2.106338322927, 0.4511432468827, 1.775752689, 0.11},
    {2.019311637304, -1.380850955423, 0.3735888690926, 1.373449944, 0.39},
    {1.857655582912, -1.214565804178, 0.3569298529214, 1.034163562, 0.85},
    {1.875000000656, -1.250000000728, 0.3750000000728, 1.000024931, 1},
};

constexpr PolarStep kPolarSteps64[] = {
    {7.634715627609, -18.54302491286, 12.74377378676, 1, 7.8e-11},
    {3.817357811074, -2.317878114237, 0.3982429311656, 1.999999999, 3e-10},
    {3.817357799073, -2.317878112053, 0.3982429316674, 1.999999997, 1.2e-09},
    {3.817357752802, -2.317878103636, 0.3982429336021, 1.999999989, 4.3e-09},
    {3.817357574404, -2.317878071182, 0.3982429410612, 1.999999956, 1.7e-08},
    {3.817356886586, -2.317877946055, 0.3982429698204, 1.99999983, 6.3e-08},
    {3.817354234685, -2.317877463626, 0.3982430807024, 1.999999343, 2.4e-07},
    {3.817344010245, -2.317875603622, 0.3982435082138, 1.999997467, 9.1e-07},
    {3.817304590287, -2.31786843256, 0.3982451565343, 1.999990234, 3.5e-06},
    {3.817152615691, -2.317840787876, 0.3982515122302, 1.999962349, 1.4e-05},
    {3.816566825779, -2.317734256053, 0.3982760249138, 1.999854842, 5.1e-05},
    {3.814310565667, -2.317324308477, 0.398370654703, 1.999440455, 0.0002},
    {3.805645141915, -2.315755447742, 0.3987372913761, 1.997844379, 0.00074},
    {3.772729715558, -2.309879141042, 0.4001774172225, 1.991714458, 0.0029},
    {3.652847175025, -2.289704414852, 0.4061225418422, 1.968429654, 0.011},
    {3.279304537373, -2.244876235664, 0.4348433277786, 1.88359935, 0.042},
    {2.397598588179, -1.72322752365, 0.4094995609255, 1.618107653, 0.16},
    {1.887552621898, -1.246717103799, 0.3600971942716, 1.17060807, 0.5},
    {1.856445899026, -1.213248855295, 0.3568007278828, 1.003133825, 0.88},
    {1.856435643564, -1.21323768491, 0.3567996328525, 1.000000019, 1},
    {1.875, -1.25, 0.375, 1, 1},
};

// A row of the schedule and the rows to its end.
struct PolarSchedule {
    const PolarStep* step;
    int count;
};

template <class T>
constexpr PolarSchedule polar_schedule() {
    if constexpr (std::is_same_v<T, float>) return {kPolarSteps32, sizeof kPolarSteps32 / sizeof(PolarStep)};
    else return {kPolarSteps64, sizeof kPolarSteps64 / sizeof(PolarStep)};
}

// The last `steps` rows; 0, or more than there are: all of them.
template <class T>
PolarSchedule polar_schedule(int steps) {
    const PolarSchedule all = polar_schedule<T>();
    if (steps <= 0 || steps >= all.count) return all;
    return {all.step + (all.count - steps), steps};
}

// The shortest tail that serves singular values down to `lowest` times the norm.
template <class T>
PolarSchedule polar_schedule_for(double lowest) {
    PolarSchedule rest = polar_schedule<T>();
    while (rest.count > 1 && rest.step[1].lowest <= lowest) ++rest.step, --rest.count;
    return rest;
}

}  // namespace otkd_fast
