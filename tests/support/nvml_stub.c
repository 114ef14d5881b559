/* A libnvidia-ml.so.1 for tests: lets the real nvidia-ml-py run without a GPU.

     gcc -shared -fPIC -o DIR/libnvidia-ml.so.1 tests/support/nvml_stub.c -lm
     LD_LIBRARY_PATH=DIR python …

   -Dfunction=hidden leaves a function out, as an older driver does. The rest is said in the environment:

     NVML_STUB_GPUS=1              how many GPUs; figures differ between them, see the functions
     NVML_STUB_UNLIKE=0            whether all but GPU 0 have another name
     NVML_STUB_MIG=0               GPU 0 has so many MIG devices (places 0, 2, 4, …)
     NVML_STUB_WATTS=300           mean power of GPU 0; GPU 1 has twice as much, and so on
     NVML_STUB_SWING=0             amplitude in watts of a sine of period 0.7 s in CLOCK_MONOTONIC, on top of it
     NVML_STUB_LIMIT_WATTS=700     the power limit that is enforced; by default it is 700 W
     NVML_STUB_SM_MHZ=1700         the SM clock of GPU 0, whose highest is 1980 MHz
     NVML_STUB_REASONS=5           mask of the reasons that lower the clock: 4 the power cap, 1 idle; 0x88 is a power brake
     NVML_STUB_PCIE_MS=0           how long a reading of the PCIe traffic takes (20 with a real driver)
     NVML_STUB_FAULTS=who=code,…   what a function, or every function asked about a GPU ("gpu0"), returns instead
     NVML_STUB_FAULTS_FROM=0, NVML_STUB_FAULTS_UNTIL=1e9    seconds after loading between which it does
*/
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_GPUS = 16, MAX_PLACES = 8 };
enum { FIELD_NVLINK_TX = 138, FIELD_NVLINK_RX = 139, TYPE_UNSIGNED_LONG_LONG = 3 };
#define ALL_LINKS 0xFFFFFFFFu
#define SWING_PERIOD 0.7

typedef struct {
    int gpu, place; /* place of a MIG device, -1 for the whole GPU */
} Device;

typedef struct {
    unsigned version, sensor;
    int celsius;
} Temperature;

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type, result;
    union {
        double real;
        unsigned long long whole;
    } value;
} FieldValue;

static Device devices[MAX_GPUS][MAX_PLACES + 1];
static double loaded;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

__attribute__((constructor)) static void load(void) {
    loaded = now();
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        for (int place = -1; place < MAX_PLACES; place++) devices[gpu][place + 1] = (Device){gpu, place};
}

static double setting(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text ? atof(text) : otherwise;
}

static int fault(const char *who) {
    const char *faults = getenv("NVML_STUB_FAULTS");
    double age = now() - loaded;
    if (!faults || age < setting("NVML_STUB_FAULTS_FROM", 0) || age > setting("NVML_STUB_FAULTS_UNTIL", 1e9)) return SUCCESS;
    size_t length = strlen(who);
    for (const char *at = faults; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, who, length) && at[length] == '=') return atoi(at + length + 1);
    }
    return SUCCESS;
}

static int fault_of_gpu(int gpu) {
    char who[16];
    snprintf(who, sizeof who, "gpu%d", gpu);
    return fault(who);
}

/* Each function begins with one of these. */
#define CALL \
    { \
        int code = fault(__func__); \
        if (code) return code; \
    }
#define CALL_ABOUT(gpu) \
    CALL { \
        int code = fault_of_gpu(gpu); \
        if (code) return code; \
    }

static int copy(char *target, unsigned size, const char *text) {
    return snprintf(target, size, "%s", text) < (int)size ? SUCCESS : INSUFFICIENT_SIZE;
}

/* ---- the library and its devices ---- */

int nvmlInitWithFlags(unsigned flags) { CALL return SUCCESS; }
int nvmlShutdown(void) { CALL return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    CALL *count = setting("NVML_STUB_GPUS", 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    CALL_ABOUT((int)index)
    if (index >= setting("NVML_STUB_GPUS", 1)) return INVALID_ARGUMENT;
    *device = &devices[index][0];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned size) {
    CALL_ABOUT(device->gpu)
    char text[64];
    if (device->place < 0)
        snprintf(text, sizeof text, "GPU-%d000abcd-0000-0000-0000-000000000000", device->gpu + 1);
    else
        snprintf(text, sizeof text, "MIG-%d90%dabcd-0000-0000-0000-000000000000", device->gpu + 1, device->place);
    return copy(uuid, size, text);
}

int nvmlDeviceGetName(Device *device, char *name, unsigned size) {
    CALL_ABOUT(device->gpu)
    if (device->gpu > 0 && setting("NVML_STUB_UNLIKE", 0)) return copy(name, size, "Other GPU");
    return copy(name, size, device->place < 0 ? "Stub GPU" : "Stub GPU MIG 1g.10gb");
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    CALL_ABOUT(device->gpu)
    if (device->gpu > 0) return NOT_SUPPORTED;
    *current = *pending = setting("NVML_STUB_MIG", 0) > 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    CALL_ABOUT(device->gpu) *count = MAX_PLACES;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned place, Device **part) {
    CALL_ABOUT(device->gpu)
    if (place % 2 || place >= 2 * setting("NVML_STUB_MIG", 0)) return NOT_FOUND;
    *part = &devices[device->gpu][place + 1];
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(Device *device, unsigned *id) {
    CALL_ABOUT(device->gpu) *id = device->place + 7;
    return SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(Device *device, unsigned *id) {
    CALL_ABOUT(device->gpu) *id = 0;
    return SUCCESS;
}

/* ---- power and energy ---- */

int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    double swing = setting("NVML_STUB_SWING", 0) * sin(2 * M_PI * now() / SWING_PERIOD);
    *milliwatts = 1e3 * (setting("NVML_STUB_WATTS", 300) * (device->gpu + 1) + swing);
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *milliwatts) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    *milliwatts = 1e3 * setting("NVML_STUB_LIMIT_WATTS", 700);
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementDefaultLimit(Device *device, unsigned *milliwatts) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    *milliwatts = 700000;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *millijoules) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    double omega = 2 * M_PI / SWING_PERIOD, time = now();
    double swing = setting("NVML_STUB_SWING", 0) * (1 - cos(omega * time)) / omega;
    *millijoules = 1e3 * (setting("NVML_STUB_WATTS", 300) * (device->gpu + 1) * time + swing);
    return SUCCESS;
}

/* ---- the other readings: constants; GPU n adds n, a MIG device in place p adds 10 + p to what it has of its own ---- */

static int own(Device *device) { return device->gpu + (device->place < 0 ? 0 : 10 + device->place); }

int nvmlDeviceGetUtilizationRates(Device *device, unsigned rates[2]) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    rates[0] = 90 + device->gpu;
    rates[1] = 40 + device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, unsigned long long total_free_used[3]) {
    CALL_ABOUT(device->gpu)
    total_free_used[0] = 80ull << 30;
    total_free_used[2] = (unsigned long long)(5 + own(device)) << 30;
    total_free_used[1] = total_free_used[0] - total_free_used[2];
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *device, unsigned type, unsigned *mhz) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    *mhz = (type == 1 ? setting("NVML_STUB_SM_MHZ", 1700) : type == 2 ? 2600 : 0) + device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(Device *device, unsigned type, unsigned *mhz) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    *mhz = type == 1 ? 1980 : 0;
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(Device *device, Temperature *temperature) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    temperature->celsius = 60 + device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *celsius) {
    CALL_ABOUT(device->gpu)
    *celsius = 50 + device->gpu; /* unlike the newer function's, so that a test sees which was asked */
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    *reasons = setting("NVML_STUB_REASONS", 5);
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) {
    CALL_ABOUT(device->gpu) *reasons = 0x40; /* hardware thermal slowdown */
    return SUCCESS;
}

int nvmlDeviceGetPcieThroughput(Device *device, unsigned counter, unsigned *kilobytes_per_second) {
    CALL_ABOUT(device->gpu)
    if (device->place >= 0) return NOT_SUPPORTED;
    struct timespec pause = {0, (long)(1e6 * setting("NVML_STUB_PCIE_MS", 0))};
    nanosleep(&pause, NULL);
    *kilobytes_per_second = (counter == 0 ? 1000000 : 2000000) + device->gpu;
    return SUCCESS;
}

/* NVLink counters in KiB over all links: 3 GiB/s sent and 4 GiB/s received. */
int nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) {
    CALL_ABOUT(device->gpu)
    for (int i = 0; i < count; i++) {
        FieldValue *value = &values[i];
        int gibibytes = value->field == FIELD_NVLINK_TX ? 3 : value->field == FIELD_NVLINK_RX ? 4 : 0;
        value->type = TYPE_UNSIGNED_LONG_LONG;
        value->result = gibibytes && value->scope == ALL_LINKS && device->place < 0 ? SUCCESS : NOT_SUPPORTED;
        value->value.whole = gibibytes * now() * (1 << 20);
    }
    return SUCCESS;
}

int nvmlDeviceGetJpgUtilization(Device *device, unsigned *percent, unsigned *period_us) {
    CALL_ABOUT(device->gpu)
    *percent = 20 + own(device);
    *period_us = 200000;
    return SUCCESS;
}

int nvmlDeviceGetDecoderUtilization(Device *device, unsigned *percent, unsigned *period_us) {
    CALL_ABOUT(device->gpu)
    *percent = 10 + own(device);
    *period_us = 200000;
    return SUCCESS;
}
