#define TOPK_TARGET neondot
#define TOPK_TARGET_NAME "neondot"
#define TOPK_SCREENS
#include "target.h"
