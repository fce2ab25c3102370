// A Vulkan layer for tests: says that a device's integer dot products are accelerated. Mesa's lavapipe has them and computes them right, but says
// that they are not fast, and then ggml leaves out the shaders that use them. With this layer they run without a GPU.
//
//     clang -shared -fPIC -o int_dot.so int_dot.c
//     VK_ADD_LAYER_PATH=. VK_INSTANCE_LAYERS=VK_LAYER_TURBO_int_dot ...
#include <string.h>
#include <vulkan/vk_layer.h>

#define EXPORT __attribute__((visibility("default")))

static PFN_vkGetInstanceProcAddr          next_proc_addr;
static PFN_vkGetPhysicalDeviceProperties2 next_properties;

static VKAPI_ATTR void VKAPI_CALL get_properties(VkPhysicalDevice device, VkPhysicalDeviceProperties2 * properties) {
    next_properties(device, properties);
    for (VkBaseOutStructure * next = properties->pNext; next; next = next->pNext) {
        if (next->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_PROPERTIES) {
            ((VkPhysicalDeviceShaderIntegerDotProductProperties *) next)
                ->integerDotProduct4x8BitPackedSignedAccelerated = VK_TRUE;
        } else if (next->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_PROPERTIES) {
            ((VkPhysicalDeviceVulkan13Properties *) next)->integerDotProduct4x8BitPackedSignedAccelerated = VK_TRUE;
        }
    }
}

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo *  info,
                                                      const VkAllocationCallbacks * allocator,
                                                      VkInstance *                  instance) {
    VkLayerInstanceCreateInfo * link = (VkLayerInstanceCreateInfo *) info->pNext;
    while (link &&
           (link->sType != VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO || link->function != VK_LAYER_LINK_INFO)) {
        link = (VkLayerInstanceCreateInfo *) link->pNext;
    }
    if (!link) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    next_proc_addr     = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    const VkResult result =
        ((PFN_vkCreateInstance) next_proc_addr(NULL, "vkCreateInstance"))(info, allocator, instance);
    if (result == VK_SUCCESS) {
        next_properties =
            (PFN_vkGetPhysicalDeviceProperties2) next_proc_addr(*instance, "vkGetPhysicalDeviceProperties2");
    }
    return result;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_proc_addr(VkInstance instance, const char * name) {
    if (strcmp(name, "vkGetInstanceProcAddr") == 0) {
        return (PFN_vkVoidFunction) get_proc_addr;
    }
    if (strcmp(name, "vkCreateInstance") == 0) {
        return (PFN_vkVoidFunction) create_instance;
    }
    if (strcmp(name, "vkGetPhysicalDeviceProperties2") == 0 || strcmp(name, "vkGetPhysicalDeviceProperties2KHR") == 0) {
        return (PFN_vkVoidFunction) get_properties;
    }
    return next_proc_addr ? next_proc_addr(instance, name) : NULL;
}

EXPORT VKAPI_ATTR VkResult VKAPI_CALL vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface * layer) {
    if (layer->loaderLayerInterfaceVersion > 2) {
        layer->loaderLayerInterfaceVersion = 2;
    }
    layer->pfnGetInstanceProcAddr       = get_proc_addr;
    layer->pfnGetDeviceProcAddr         = NULL;
    layer->pfnGetPhysicalDeviceProcAddr = NULL;
    return VK_SUCCESS;
}
