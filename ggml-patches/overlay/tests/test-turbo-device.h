#pragma once

// A device that can do less than the CPU, for what is refused at start-up: the CPU under another name, as a GPU, which says no to some ops.

#include "../ggml/src/ggml-backend-impl.h"
#include "test-turbo-session.h"

class limited_device {
  public:
    // Loads the model once more, all layers on the device. `model` is that one until the object goes.
    //   knows_turbo: its backend says that it knows the ops of turbo caches
    explicit limited_device(bool (*lacks)(const ggml_tensor * op), bool knows_turbo = true) : cpu_model(model) {
        is_lacking = lacks;
        cpu        = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

        device                = *cpu;
        device.iface.get_name = [](ggml_backend_dev_t) {
            return "LIMITED";
        };
        device.iface.get_type = [](ggml_backend_dev_t) {
            return GGML_BACKEND_DEVICE_TYPE_GPU;
        };
        if (!knows_turbo) {
            foreign                        = *cpu->reg;
            foreign.iface.get_proc_address = [](ggml_backend_reg_t, const char * name) {
                return strcmp(name, "ggml_turbo_ops") == 0 ? nullptr :
                                                             ggml_backend_reg_get_proc_address(cpu->reg, name);
            };
            device.reg = &foreign;
        }
        device.iface.get_props    = get_props;
        device.iface.init_backend = init_backend;
        device.iface.supports_op  = [](ggml_backend_dev_t, const ggml_tensor * op) {
            return !is_lacking(op) && ggml_backend_dev_supports_op(cpu, op);
        };

        ggml_backend_dev_t devices[] = { &device, nullptr };
        llama_model_params params    = llama_model_default_params();
        params.n_gpu_layers          = 999;
        params.devices               = devices;

        own_model.reset(llama_model_load_from_file(model_path.c_str(), params));
        if (!own_model) {
            printf("FAIL can't load the model on the limited device:\n%s", log_text.c_str());
            exit(1);
        }
        model = own_model.get();
    }

    ~limited_device() { model = cpu_model; }

    limited_device(const limited_device &)             = delete;
    limited_device & operator=(const limited_device &) = delete;

  private:
    static inline bool (*is_lacking)(const ggml_tensor * op) = nullptr;
    static inline ggml_backend_dev_t  cpu                    = nullptr;
    static inline ggml_backend_device device;
    static inline ggml_backend_reg    foreign;

    llama_model *   cpu_model;
    llama_model_ptr own_model;

    static void get_props(ggml_backend_dev_t, ggml_backend_dev_props * props) {
        ggml_backend_dev_get_props(cpu, props);
        props->name = "LIMITED";
        props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    }

    static ggml_backend_t init_backend(ggml_backend_dev_t, const char * params) {
        ggml_backend_t backend = ggml_backend_dev_init(cpu, params);
        backend->device        = &device;
        return backend;
    }
};
