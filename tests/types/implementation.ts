/** That the declarations have what the source has, no more and no less. */

import type * as declared from '../../vlm_export/js/index.d.ts';
import type { WorkerModel as DeclaredWorkerModel } from '../../vlm_export/js/remote.d.ts';
import type * as answer from '../../vlm_export/js/src/answer.js';
import type * as source from '../../vlm_export/js/src/model.js';
import type * as places from '../../vlm_export/js/src/places.js';
import type { WorkerModel } from '../../vlm_export/js/src/remote.js';
import type * as declared_worker from '../../vlm_export/js/worker.d.ts';

type Model = declared.VisionLanguageModel;
type Source = source.VisionLanguageModel;
/** Without what is private. */
type Public<Type> = { [Name in keyof Type]: Type[Name] };
type Same<One, Other> = [One, Other] extends [Other, One] ? true : false;

/** Where the first is what the other asks for. */
function fits<_Source extends Wanted, Wanted>(): void {}
function holds<_Fact extends true>(): void {}

fits<Public<Source>, Public<Model>>();
holds<Same<keyof Source, keyof Model>>();
holds<Same<keyof typeof source | 'load_from', keyof typeof declared>>();
holds<Same<typeof places.load_from, typeof declared.load_from>>();
holds<Same<typeof answer, typeof declared_worker>>();
holds<Same<keyof typeof source.VisionLanguageModel, keyof typeof declared.VisionLanguageModel>>();

type Loading = typeof source.VisionLanguageModel.from_pretrained;
holds<Same<Parameters<Loading>, Parameters<typeof declared.VisionLanguageModel.from_pretrained>>>();

fits<Public<WorkerModel>, Public<DeclaredWorkerModel>>();
holds<Same<keyof WorkerModel, keyof DeclaredWorkerModel>>();
holds<Same<Parameters<typeof WorkerModel.from_pretrained>, Parameters<typeof DeclaredWorkerModel.from_pretrained>>>();

/** `any` would fit everything. */
type IsAny<Type> = 0 extends 1 & Type ? true : false;
type Anys<Type> = { [Name in keyof Type]: IsAny<Type[Name]> extends true ? Name : never }[keyof Type];
holds<Same<Anys<Source>, never>>();
holds<Same<Anys<WorkerModel>, never>>();
